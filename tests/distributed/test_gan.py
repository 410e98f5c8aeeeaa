"""DMD2 with a GAN, on data, without the normaliser, and with accumulated gradients: on ranks as in plain PyTorch, however a
sample is split."""

import itertools

import pytest

from dmd_ds.recipe import dump_recipe
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import make_dataset

STEPS = 4
# weights that let each part of the gradients show; R1 is there too
TOKEN = {"generator_weight": 0.5, "discriminator_weight": 0.7, "blocks": [1, 0], "width": 8, "r1_weight": 0.3, "r1_strength": 1.0}
# so weak a head moves little: R1 is measured over a longer way, or rounding is all it sees
CONVOLUTION = TOKEN | {"head": "convolution", "blocks": [1], "r1_strength": 10.0}
VARIANTS = {
    "token": {"gan": TOKEN},
    "convolution": {"gan": CONVOLUTION},
    "data": {"rollout": {"input": "data"}, "score": {"normaliser": False}},
}
# variant, ranks, Ulysses, ring, accumulation
RUNS = [
    ("token", 1, 1, 1, 2), ("token", 2, 1, 1, 1), ("token", 2, 2, 1, 1), ("token", 4, 2, 2, 1), ("token", 4, 2, 1, 1),
    ("convolution", 1, 1, 1, 1), ("convolution", 4, 2, 2, 1), ("data", 1, 1, 1, 2), ("data", 2, 2, 1, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    make_dataset(folder / "uneven", shapes=((4, 3, 4, 6),), words=200)  # 18 tokens: they do not divide by 4
    return folder


def recipe_for(world, variant: str, ranks: int, ulysses: int, ring: int, accumulation: int):
    return sharp_recipe(
        world,
        f"{variant}-{ranks}-{ulysses}x{ring}-{accumulation}",
        parallel={"ulysses": ulysses, "ring": ring},
        data={"path": str(world / "uneven"), "batch_size": 2 * ulysses * ring // (ranks * accumulation), "accumulation": accumulation},
        max_steps=STEPS,
        **VARIANTS[variant],
    )


@pytest.fixture(scope="module")
def trained(world):
    """A run of each, those of as many ranks in one job."""
    recipes = {run: recipe_for(world, *run) for run in RUNS}
    for count, runs in itertools.groupby(sorted(RUNS, key=lambda run: run[1]), lambda run: run[1]):
        files = []
        for run in runs:
            files.append(world / f"{len(files)}-of-{count}.yaml")
            files[-1].write_text(dump_recipe(recipes[run]))
        assert_fine(run_ranks(count, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.fixture(scope="module")
def plain(world):
    return {variant: plain_dmd2(recipe_for(world, variant, 1, 1, 1, 1), global_batch_size=2, epsilon=EPSILON) for variant in VARIANTS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_losses_norms_and_weights_are_those_of_plain_pytorch(trained, plain, run):
    lines, generator, adapter_and_head = plain[run[0]]
    assert_same_numbers(metrics(trained[run]), lines, 1e-4)
    assert_trained_as(trained[run], STEPS, generator, adapter_and_head)


def test_the_gan_is_there_and_its_head_learns(trained):
    run = trained[RUNS[0]]
    assert all({"loss/gan_discriminator", "loss/r1"} <= line.keys() for line in metrics(run))
    assert "loss/gan_generator" in metrics(run)[0]
    early, late = weights(run, 2, "fake_score"), weights(run, STEPS, "fake_score")
    head = [name for name in early if name.startswith("head.")]
    assert head and all((early[name] - late[name]).abs().max() > 1e-5 for name in head)

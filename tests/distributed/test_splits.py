"""What a run computes does not depend on how it is split over ranks: data, Ulysses, ring, and all of them together."""

import itertools
import json
from pathlib import Path

import pytest

from dmd_ds.data.latents import BatchOrder, LatentsDataset
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import dump_recipe
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import make_dataset

STEPS = 4
# 18 tokens, which 4 ranks share as 5, 5, 5 and 3; and 5, of which the fourth of them gets none at all
SHAPES = ((4, 3, 4, 6), (4, 1, 2, 10))
# data, Ulysses, ring, how
SPLITS = [
    (1, 1, 1, ""), (2, 1, 1, ""), (1, 2, 1, ""), (1, 1, 2, ""), (1, 2, 2, ""), (2, 2, 1, ""), (1, 1, 4, ""),
    (1, 2, 2, "not checkpointed"), (2, 2, 1, "copies inside nodes of 2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    make_dataset(folder / "uneven", shapes=SHAPES, words=200)
    return folder


def recipe_for(world, data: int, ulysses: int, ring: int, how: str):
    recipe = sharp_recipe(
        world,
        f"{data}x{ulysses}x{ring} {how}",
        parallel={"ulysses": ulysses, "ring": ring},
        data={"path": str(world / "uneven"), "batch_size": 2 // data},
        max_steps=STEPS,
        activation_checkpointing=how != "not checkpointed",
    )
    if how != "copies inside nodes of 2":
        return recipe
    ds_config = json.loads(Path(recipe.generator.ds_config).read_text())
    ds_config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (world / "hierarchical.json").write_text(json.dumps(ds_config))
    changed = {"ds_config": str(world / "hierarchical.json")}
    sections = {name: getattr(recipe, name).model_copy(update=changed) for name in ("generator", "fake_score")}
    return recipe.model_copy(update=sections)


@pytest.fixture(scope="module")
def trained(world):
    """A run for every split, those of as many ranks in one job."""
    recipes = {split: recipe_for(world, *split) for split in SPLITS}

    def ranks(split) -> int:
        return split[0] * split[1] * split[2]

    for count, splits in itertools.groupby(sorted(SPLITS, key=ranks), ranks):
        files = []
        for split in splits:
            files.append(world / f"{len(files)}-of-{count}.yaml")
            files[-1].write_text(dump_recipe(recipes[split]))
        assert_fine(run_ranks(count, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.fixture(scope="module")
def plain(world):
    return plain_dmd2(recipe_for(world, 1, 1, 1, "not checkpointed"), global_batch_size=2, epsilon=EPSILON)


def test_both_sizes_come_up(world):
    recipe = recipe_for(world, *SPLITS[0])
    order = BatchOrder(LatentsDataset(recipe.data.path).buckets(), 2, Randomness(recipe.seed))
    assert {order(step)[0] for step in range(STEPS)} == set(SHAPES)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: " ".join(["x".join(map(str, split[:3])), split[3]]))
def test_losses_norms_and_weights_are_those_of_plain_pytorch(trained, plain, split):
    lines, generator, adapter = plain
    assert_same_numbers(metrics(trained[split]), lines, 1e-4)
    assert_trained_as(trained[split], STEPS, generator, adapter)


def test_training_moved_the_weights(trained):
    recipe = trained[SPLITS[0]]
    for engine in ("generator", "fake_score"):
        early, late = weights(recipe, 2, engine), weights(recipe, STEPS, engine)
        moved = [name for name in early if (early[name] - late[name]).abs().max() > 1e-5]
        assert len(moved) > 0.9 * len(early), engine

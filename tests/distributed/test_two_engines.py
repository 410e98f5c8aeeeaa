"""Two ZeRO-3 engines on gloo ranks against plain PyTorch, against another number of ranks, and against themselves resumed."""

import json
from pathlib import Path

import pytest
import torch

from dmd_ds.checkpoint import ZeroWeights
from tests.distributed.launch import metrics, train
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import make_recipe

STEPS = 4
EPSILON = 1e-6
LOGGED = ("loss/dm", "grad_norm/generator", "loss/fake_score", "grad_norm/fake_score")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


def recipe_for(world: Path, name: str, **changes):
    ds_config = world / "gather_everything.json"  # the mini model is small enough to be kept whole: forbid that
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000}
    # Adam's step for a gradient of 1e-9 is as large as for one of 1: an epsilon above the noise keeps the comparison meaningful
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "eps": EPSILON}}
    ds_config.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer}))
    sections = {
        # clipping well below the norms there are, so that a wrong norm shows in the weights
        "generator": {"lr": 1e-3, "warmup_steps": 1, "max_grad_norm": 0.05, "ds_config": str(ds_config)},
        "fake_score": {
            "lr": 1e-3, "warmup_steps": 2, "max_grad_norm": 0.2, "updates_per_generator_update": 2, "lora_rank": 4, "lora_alpha": 8,
            "ds_config": str(ds_config),
        },
    }  # fmt: skip
    return make_recipe(world, **{"output_dir": str(world / name), "max_steps": STEPS, "save_every": 2, **sections, **changes})


def weights(recipe, step: int, engine: str) -> dict[str, torch.Tensor]:
    zero = ZeroWeights(Path(recipe.output_dir) / "checkpoints" / f"step_{step:06d}" / engine)
    return {name: zero.read(name) for name in zero.shapes}


@pytest.fixture(scope="module")
def two_ranks(world):
    recipe = recipe_for(world, "two_ranks", data={"batch_size": 1})
    train(recipe, ranks=2)
    return recipe


@pytest.fixture(scope="module")
def one_rank(world):
    recipe = recipe_for(world, "one_rank", data={"batch_size": 2})
    train(recipe, ranks=1)
    return recipe


@pytest.fixture(scope="module")
def plain(world):
    return plain_dmd2(recipe_for(world, "plain"), global_batch_size=2, epsilon=EPSILON)


def assert_same_numbers(lines: list[dict], others: list[dict], tolerance: float) -> None:
    assert len(lines) == len(others) == STEPS
    for line, other in zip(lines, others, strict=True):
        for key in LOGGED:
            assert (key in line) == (key in other)
            if key in line:
                assert line[key] == pytest.approx(other[key], rel=tolerance), key


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name].detach(), atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("run", ["two_ranks", "one_rank"])
def test_losses_and_gradient_norms_are_those_of_plain_pytorch(run, plain, request):
    assert_same_numbers(metrics(request.getfixturevalue(run)), plain[0], 1e-4)


@pytest.mark.parametrize("run", ["two_ranks", "one_rank"])
def test_weights_are_those_of_plain_pytorch(run, plain, request):
    _, generator, adapter = plain
    recipe = request.getfixturevalue(run)
    assert_same_weights(weights(recipe, STEPS, "generator"), {f"transformer.{k}": v for k, v in generator.items()}, 1e-4)
    trained = {name.replace(".fake_score.", ".default."): w for name, w in weights(recipe, STEPS, "fake_score").items()}
    assert_same_weights(trained, {f"transformer.{k}": v for k, v in adapter.items()}, 1e-4)


def test_training_moved_both_models(two_ranks):
    """What the other tests compare has changed: two runs that do nothing would agree too."""
    for engine in ("generator", "fake_score"):
        early, late = weights(two_ranks, 2, engine), weights(two_ranks, STEPS, engine)
        moved = [name for name in early if (early[name] - late[name]).abs().max() > 1e-5]
        assert len(moved) > 0.9 * len(early), engine


def test_two_ranks_of_one_are_one_rank_of_two(two_ranks, one_rank):
    assert_same_numbers(metrics(two_ranks), metrics(one_rank), 1e-4)
    assert_same_weights(weights(two_ranks, STEPS, "generator"), weights(one_rank, STEPS, "generator"), 1e-5)


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(world, two_ranks):
    train(recipe_for(world, "resumed", data={"batch_size": 1}, max_steps=2), ranks=2)
    resumed = recipe_for(world, "resumed", data={"batch_size": 1})
    train(resumed, ranks=2)
    strip = [{key: line[key] for key in line if key != "seconds"} for line in metrics(resumed)]
    assert strip == [{key: line[key] for key in line if key != "seconds"} for line in metrics(two_ranks)]
    for engine in ("generator", "fake_score"):
        assert_same_weights(weights(resumed, STEPS, engine), weights(two_ranks, STEPS, engine), 0.0)


def test_activation_checkpointing_changes_no_number(world, one_rank):
    recipe = recipe_for(world, "no_checkpointing", data={"batch_size": 2}, activation_checkpointing=False)
    train(recipe, ranks=1)
    assert_same_numbers(metrics(recipe), metrics(one_rank), 1e-6)

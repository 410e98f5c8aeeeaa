"""A run that changes ranks and layout at every step, against plain PyTorch that never stopped."""

import json
from pathlib import Path

import pytest

from dmd_ds.checkpoint import check_same_recipe
from dmd_ds.errors import UserError
from tests.distributed.comparing import (
    EMA_DECAY,
    EPSILON,
    assert_same_numbers,
    assert_same_weights,
    assert_trained_as,
    averages,
    sharp_recipe,
)
from tests.distributed.launch import metrics, train
from tests.distributed.plain_dmd2 import PlainEMA, plain_dmd2

# (ranks, what the recipe says of them); the global batch is 2 throughout
LAYOUTS = [
    (2, {"data": {"batch_size": 1}}),
    (1, {"data": {"batch_size": 1, "accumulation": 2}, "background_save": True}),
    (4, {"data": {"batch_size": 1}, "parallel": {"ulysses": 2}, "background_save": True}),
    (2, {"data": {"batch_size": 2}, "parallel": {"ring": 2}}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    world = tmp_path_factory.mktemp("resharding")
    for step, (ranks, layout) in enumerate(LAYOUTS, 1):
        recipe = sharp_recipe(world, "run", max_steps=step, **layout)
        train(recipe, ranks)
    return recipe


@pytest.fixture(scope="module")
def plain(run):
    ema = PlainEMA(EMA_DECAY)
    folder = Path(run.output_dir).parent
    return *plain_dmd2(sharp_recipe(folder, "plain"), global_batch_size=2, epsilon=EPSILON, ema=ema), ema


def test_on_2_then_1_then_4_then_2_ranks_the_losses_are_those_of_a_run_that_never_stopped(run, plain):
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert_same_numbers(metrics(run), plain[0], 1e-4)


def test_and_so_are_the_weights_and_their_average(run, plain):
    _, generator, adapter, ema = plain
    assert_trained_as(run, len(LAYOUTS), generator, adapter)
    assert_same_weights(averages(run, len(LAYOUTS)), {f"transformer.{name}": weight for name, weight in ema.weights.items()}, 1e-5)


def test_each_checkpoint_says_who_wrote_it_and_the_newest_is_latest(run):
    folder = Path(run.output_dir) / "checkpoints"
    states = [json.loads((folder / f"step_{step:06d}" / "state.json").read_text()) for step in range(1, len(LAYOUTS) + 1)]
    assert [state["world_size"] for state in states] == [ranks for ranks, _ in LAYOUTS]
    assert {state["global_batch_size"] for state in states} == {2}
    assert (folder / "latest").read_text() == "step_000004" and not list(folder.glob("*.unfinished"))


def test_another_global_batch_is_refused_with_both_numbers(run):
    newest = Path(run.output_dir) / "checkpoints" / "step_000004"
    with pytest.raises(UserError, match="data.batch_size=2 on 4 ranks is a global batch of 4, the run in .*run has 2"):
        check_same_recipe(newest, run, 4)

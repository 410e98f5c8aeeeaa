"""Two ZeRO-3 engines on gloo ranks against plain PyTorch, against another number of ranks, and against themselves resumed."""

from pathlib import Path

import pytest

from dmd_ds.monitor import OF_THE_MACHINE
from dmd_ds.recipe import dump_recipe
from tests.distributed.comparing import (
    EMA_DECAY,
    EPSILON,
    assert_same_numbers,
    assert_same_weights,
    assert_trained_as,
    averages,
    sharp_recipe,
    weights,
)
from tests.distributed.launch import assert_fine, metrics, run_ranks, train
from tests.distributed.plain_dmd2 import PlainEMA, plain_dmd2

STEPS = 4
LOOKED_AT = {"every": 2, "prompts": 3, "batch_size": 1}
# How a sample can be made and looked at, beside the defaults: by the ODE, on other noise levels, to the last step, with weights gathered
# once or each time, ...
WAYS = {
    "ode on wan's grid": {"sampling": {"grid": "wan", "steps": 5, "shift": 7.0, "solver": "ode"}, "parallel": {"gather": "update"}},
    "listed timesteps, scores above the exit": {
        "sampling": {"timesteps": [1000, 850, 500]}, "score": {"above_exit": True}, "parallel": {"gather": "each"},
    },
    "ode, exit last, guided below": {"sampling": {"solver": "ode"}, "rollout": {"exit": "last"}, "score": {"guidance_below": 0.8}},
    "regression first": {"regression": {"steps": 2, "teacher_steps": 5, "lr": 3e-3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two_ranks(world):
    recipe = sharp_recipe(world, "two_ranks", data={"batch_size": 1}, validation=LOOKED_AT)
    train(recipe, ranks=2)
    return recipe


@pytest.fixture(scope="module")
def one_rank(world):
    recipe = sharp_recipe(world, "one_rank", data={"batch_size": 2}, validation={**LOOKED_AT, "batch_size": 2})
    train(recipe, ranks=1)
    return recipe


@pytest.fixture(scope="module")
def plain_ema():
    return PlainEMA(EMA_DECAY)


@pytest.fixture(scope="module")
def plain(world, plain_ema):
    return plain_dmd2(sharp_recipe(world, "plain"), global_batch_size=2, epsilon=EPSILON, ema=plain_ema)


@pytest.mark.parametrize("run", ["two_ranks", "one_rank"])
def test_losses_and_gradient_norms_are_those_of_plain_pytorch(run, plain, request):
    assert_same_numbers(metrics(request.getfixturevalue(run)), plain[0], 1e-4)


@pytest.mark.parametrize("run", ["two_ranks", "one_rank"])
def test_weights_are_those_of_plain_pytorch(run, plain, request):
    _, generator, adapter = plain
    assert_trained_as(request.getfixturevalue(run), STEPS, generator, adapter)


@pytest.mark.parametrize("run", ["two_ranks", "one_rank"])
def test_the_average_is_that_of_plain_pytorch(run, plain, plain_ema, request):
    recipe = request.getfixturevalue(run)
    found = averages(recipe, STEPS)
    # weights move by 1e-3 an update: a missed update, or the trained weights in its place, stand out from 1e-5
    assert_same_weights(found, {f"transformer.{name}": weight for name, weight in plain_ema.weights.items()}, 1e-5)
    apart = [name for name, weight in weights(recipe, STEPS, "generator").items() if (weight - found[name]).abs().max() > 1e-4]
    assert len(apart) > len(found) / 2


def test_the_average_takes_the_place_of_the_trained_weights_and_gives_it_back():
    """Of weights that are sharded and of weights that are kept whole, in bf16 and in fp32; on 2 ranks."""
    assert_fine(run_ranks(2, "-m", "tests.distributed.ema_ranks"))


def test_training_moved_both_models(two_ranks):
    """What the other tests compare has changed: two runs that do nothing would agree too."""
    for engine in ("generator", "fake_score"):
        early, late = weights(two_ranks, 2, engine), weights(two_ranks, STEPS, engine)
        moved = [name for name in early if (early[name] - late[name]).abs().max() > 1e-5]
        assert len(moved) > 0.9 * len(early), engine


def test_two_ranks_of_one_are_one_rank_of_two(two_ranks, one_rank):
    assert_same_numbers(metrics(two_ranks), metrics(one_rank), 1e-4)
    assert_same_weights(weights(two_ranks, STEPS, "generator"), weights(one_rank, STEPS, "generator"), 1e-5)


def test_what_validation_measures_does_not_depend_on_ranks_or_its_batches(two_ranks, one_rank):
    """Three videos on two ranks, one at a time, are three on one rank, two at a time."""
    ours, theirs = ({k: v for k, v in metrics(recipe)[-1].items() if k.startswith("validation/")} for recipe in (two_ranks, one_rank))
    assert ours.keys() == theirs.keys() and {"validation/ema/drift", "validation/trained/drift_motion"} <= ours.keys()
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert ours["validation/ema/drift"] != ours["validation/trained/drift"] > 0


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(world, two_ranks):
    changes = {"data": {"batch_size": 1}, "validation": LOOKED_AT}
    train(sharp_recipe(world, "resumed", max_steps=2, **changes), ranks=2)
    teacher = world / "resumed" / "samples" / "teacher"
    made_at = {file: file.stat().st_mtime_ns for file in teacher.iterdir()}
    resumed = sharp_recipe(world, "resumed", **changes)
    train(resumed, ranks=2)
    assert made_at == {file: file.stat().st_mtime_ns for file in teacher.iterdir()}  # the teacher is not asked again
    strip = [{key: line[key] for key in line if key not in OF_THE_MACHINE} for line in metrics(resumed)]
    assert strip == [{key: line[key] for key in line if key not in OF_THE_MACHINE} for line in metrics(two_ranks)]
    for engine in ("generator", "fake_score"):
        assert_same_weights(weights(resumed, STEPS, engine), weights(two_ranks, STEPS, engine), 0.0)
    assert_same_weights(averages(resumed, STEPS), averages(two_ranks, STEPS), 0.0)


def test_activation_checkpointing_changes_no_number(world, one_rank):
    recipe = sharp_recipe(world, "no_checkpointing", data={"batch_size": 2}, activation_checkpointing=False)
    train(recipe, ranks=1)
    assert_same_numbers(metrics(recipe), metrics(one_rank), 1e-6)


@pytest.fixture(scope="module")
def ways(world):
    """A run on two ranks for every way, all in one job."""
    recipes = {way: sharp_recipe(world, way, data={"batch_size": 1}, **changes) for way, changes in WAYS.items()}
    files = [world / f"{way}.yaml" for way in recipes]
    for file, recipe in zip(files, recipes.values(), strict=True):
        file.write_text(dump_recipe(recipe))
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.mark.parametrize("way", WAYS)
def test_other_solvers_grids_exits_score_levels_and_a_warm_up_are_those_of_plain_pytorch(ways, plain, way):
    lines, generator, adapter = plain_dmd2(ways[way], global_batch_size=2, epsilon=EPSILON)
    assert_same_numbers(metrics(ways[way]), lines, 1e-4)
    assert_trained_as(ways[way], STEPS, generator, adapter)
    if "regression" in WAYS[way]:
        assert ["loss/regression" in line for line in lines] == [True, True, False, False]
    else:
        assert abs(lines[0]["loss/dm"] / plain[0][0]["loss/dm"] - 1) > 0.01, "it makes no difference here"

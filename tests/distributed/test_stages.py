"""The stages around DMD2 on 2 ranks, a sample a rank or a sample on both, are those of plain PyTorch; stopped and resumed too."""

import pytest

from dmd_ds.recipe import dump_recipe
from dmd_ds.wan.guidance import fresh_weights
from tests.distributed.comparing import EPSILON, assert_same_weights, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_stages import plain_stage
from tests.distributed.test_guidance_embedding import SHAPES
from tests.mini import make_dataset, make_pipeline

STEPS = 4
LORA = {"lora_rank": 3, "lora_alpha": 12.0, "lr": 5e-3}
# huber_c of the size of the differences: far below them the loss is a distance, whose gradient jumps with the rounding of a sum
CFG = {"stage": "cfg_distill", "cfg_distill": {"guidance_min": 1.0, "guidance_max": 6.0, "huber_c": 0.05}}
PLUGINS = "tests.distributed.plain_stages"
REWARD = {
    "stage": "reward",
    "reward": {"rewards": {f"{PLUGINS}:redness": 2.0, f"{PLUGINS}:steadiness": 0.5}, "frames": "all", "penalty": 3.0},
    "generator": LORA,
}
HALF_STEP = {"stage": "regression", "regression": {"target": "half_step"}, "sampling": {"solver": "ode"}}
SHARED = {"parallel": {"ulysses": 2}, "data": {"batch_size": 2}}  # both ranks work on every sample
WAYS = {
    "cfg on data": CFG,
    "cfg on data, sequence parallel": {**CFG, **SHARED},
    "cfg on the teacher's path, LoRA": {
        **CFG, "cfg_distill": {**CFG["cfg_distill"], "input": "teacher", "teacher_steps": 3}, "generator": LORA,
    },
    "regression to the end": {"stage": "regression", "regression": {"target": "end", "teacher_steps": 5}},
    "regression by half steps": HALF_STEP,
    "regression by consistency": {"stage": "regression", "regression": {"target": "consistency", "teacher_steps": 5}},
    "reward": REWARD,
    "reward, sequence parallel": {**REWARD, **SHARED},
    "reward through two steps": {**REWARD, "reward": {**REWARD["reward"], "steps": 2, "frames": [0, 3]}},
}  # fmt: skip
RESUMED = ("cfg on data", "reward")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on two ranks for every way, and those that are stopped at half and go on, all in one job."""
    world = tmp_path_factory.mktemp("stages")
    make_pipeline(world / "model")
    make_dataset(world / "data", words=200)
    recipes, files = {}, []

    def add(key, name, changes, **more):
        changes = {"data": {"batch_size": 1}, "fake_score": None, "max_steps": STEPS, **changes, **more}
        recipe = sharp_recipe(world, name, **changes)
        files.append(world / f"{len(files)}.yaml")
        files[-1].write_text(dump_recipe(recipe))
        recipes[key] = recipe

    for way, changes in WAYS.items():
        add(way, way, changes)
    for way in RESUMED:
        add("half", f"{way}, resumed", WAYS[way], max_steps=2)
        add(("resumed", way), f"{way}, resumed", WAYS[way])
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.mark.parametrize("way", WAYS)
def test_losses_norms_and_weights_are_those_of_plain_pytorch(runs, way):
    recipe = runs[way]
    embedding = fresh_weights(SHAPES, seed=0) if recipe.stage == "cfg_distill" else None
    lines, trained = plain_stage(recipe, 2, EPSILON, embedding)
    logged = metrics(recipe)
    assert len(logged) == len(lines) == STEPS
    for line, other in zip(logged, lines, strict=True):
        for key, number in other.items():
            assert line[key] == pytest.approx(number, rel=1e-4, abs=1e-9), key
    early, late = weights(recipe, 2, "generator"), weights(recipe, STEPS, "generator")
    assert_same_weights(late, {f"transformer.{name}": weight for name, weight in trained.items()}, 1e-4)
    moved = [name for name in early if (early[name] - late[name]).abs().max() > 1e-5]
    assert len(moved) > 0.9 * len(early)


@pytest.mark.parametrize("way", RESUMED)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(runs, way):
    whole, resumed = runs[way], runs["resumed", way]
    assert_same_weights(weights(resumed, STEPS, "generator"), weights(whole, STEPS, "generator"), 0.0)
    strip = [[{key: line[key] for key in line if key != "seconds"} for line in metrics(recipe)] for recipe in (whole, resumed)]
    assert strip[0] == strip[1]

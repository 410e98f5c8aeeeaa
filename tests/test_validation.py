"""Validation in a run of moving shapes: what is measured, warned of, kept as the best and removed."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmd_ds import checkpoint
from dmd_ds.data import moving_shapes
from dmd_ds.errors import UserError
from dmd_ds.inputs import check_inputs
from dmd_ds.parallel.ema import check_can_average
from dmd_ds.parallel.engine import read_ds_config
from tests.distributed.launch import train
from tests.mini import make_dataset, make_recipe

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    make_recipe(folder)
    make_dataset(folder / "shapes", captions=[str(caption) for caption in moving_shapes.CAPTIONS[:7]])
    rng = np.random.default_rng(0)
    features = [moving_shapes.features(moving_shapes.draw(caption, rng, 5, 32, 32)) for caption in moving_shapes.CAPTIONS]
    save_file({"features": np.stack(features)}, folder / "reference.safetensors")
    return folder


def recipe_of(world, name: str, **validation):
    looked_at = {"every": 1, "prompts": 9, "shown": 2, "batch_size": 4, "reference": str(world / "reference.safetensors")}
    return make_recipe(
        world,
        output_dir=str(world / name),
        max_steps=STEPS,
        save_every=100,
        keep_checkpoints=1,
        data={"path": str(world / "shapes")},
        generator={"ema_decay": 0.5},
        validation=looked_at | {"drift_band": 1e-6} | validation,
    )


@pytest.fixture(scope="module")
def run(world):
    recipe = recipe_of(world, "run")
    return Path(recipe.output_dir), train(recipe, ranks=1)


def test_each_step_that_is_looked_at_has_its_numbers_in_its_line(run):
    _, lines = run
    for line in lines:
        for weights in ("trained", "ema"):
            looked = {key.rsplit("/")[-1] for key in line if key.startswith(f"validation/{weights}/")}
            judged = {"color", "shape", "motion", "both", "speed", "sharpness", "saturation"}
            drifted = {"drift", "drift_saturation", "drift_contrast", "drift_motion", "drift_latent_mean", "drift_latent_std"}
            assert looked == judged | drifted | {"frechet"}
            assert line[f"validation/{weights}/drift"] == max(abs(line[f"validation/{weights}/{what}"]) for what in drifted - {"drift"})
    assert len({line["validation/trained/frechet"] for line in lines}) > 1


def test_only_those_that_are_shown_become_files(run):
    folder, _ = run
    names = sorted(path.name for path in (folder / "samples" / "step_000001").iterdir())
    assert names == ["000_ema.mp4", "000_trained.mp4", "001_ema.mp4", "001_trained.mp4", "contact_sheet.png"]
    assert sorted(path.name for path in (folder / "samples" / "teacher").iterdir()) == ["000.mp4", "001.mp4", "measures.json"]
    assert sorted(path.name for path in (folder / "samples" / "undistilled").iterdir()) == ["000.mp4", "001.mp4"]
    prompts = json.loads((folder / "samples" / "prompts.json").read_text())
    assert prompts == [str(caption) for caption in moving_shapes.CAPTIONS[:1] * 2]


def test_the_undistilled_model_is_what_the_generator_was_before_its_first_step(world):
    recipe = recipe_of(world, "unmoved")
    recipe = recipe.model_copy(update={"max_steps": 1, "generator": recipe.generator.model_copy(update={"lr": 1e-12})})
    (line,) = train(recipe, ranks=1)
    numbers = json.loads((world / "unmoved" / "samples" / "teacher" / "measures.json").read_text())["numbers"]
    assert numbers["teacher"]["drift"] == 0 and numbers["undistilled"]["drift"] > 0
    for what, number in numbers["undistilled"].items():
        assert line[f"validation/trained/{what}"] == pytest.approx(number, rel=1e-4, abs=1e-6), what
    (start,) = [json.loads(text) for text in (world / "unmoved" / "starts.jsonl").read_text().splitlines()]
    assert start["step"] == 0 and start["versions"]["deepspeed"] and start["ranks"][0]["cores"] >= 1
    assert sum(start["planned"]["always"].values()) > 4 * 3 * 1000  # it has some thousand weights, with moments


def test_what_leaves_the_band_is_warned_of_by_name(run):
    folder, lines = run
    warnings = [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]
    assert {warning["step"] for warning in warnings} == {1, 2, 3, 4}
    motion = next(warning["warning"] for warning in warnings if warning["warning"].startswith("motion") and warning["step"] == 2)
    assert motion == f"motion of the ema weights' videos is {lines[1]['validation/ema/drift_motion']:+.0%} off the teacher's, " + (
        "validation.drift_band is 0%"
    )


def test_the_best_checkpoint_stays_beside_the_latest(run):
    folder, lines = run
    distances = [line["validation/ema/frechet"] for line in lines]
    best = checkpoint.pointed(folder, "best")
    assert best.name == f"step_{1 + int(np.argmin(distances)):06d}" and checkpoint.read_state(best).score == min(distances)
    kept = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert kept == {best.name, "step_000004"}
    assert checkpoint.find(folder / "checkpoints" / "best") == best and checkpoint.find(folder).name == "step_000004"


def test_a_resumed_run_knows_its_best_as_long_as_it_looks_the_same_way(world, run):
    folder, lines = run
    assert checkpoint.best_score(folder, recipe_of(world, "run")) == min(line["validation/ema/frechet"] for line in lines)
    assert checkpoint.best_score(folder, recipe_of(world, "run", prompts=8)) is None
    assert checkpoint.best_score(world / "none", recipe_of(world, "none")) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": "nowhere.safetensors"}, "validation.reference=nowhere.safetensors: no such file"),
        ({"prompts": 1}, "validation.prompts=1: a Fréchet distance to validation.reference takes at least 2"),
        ({"reference": None, "teacher_steps": 0}, "validation.keep_best=true compares by"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(world, changes, message):
    with pytest.raises(UserError, match=message):
        check_inputs(recipe_of(world, "refused", **changes))


def test_an_average_of_weights_on_a_disk_or_without_fp32_is_refused():
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(UserError, match="generator.ema_decay: .* offload_optimizer.device is nvme"):
        check_can_average("generator.ema_decay", nvme)
    bf16 = read_ds_config("generator.ds_config", "ds_configs/zero3_bf16_states.json")  # on the CPU all is fp32 whatever it says
    with pytest.raises(UserError, match="generator.ema_decay: averages fp32 weights; bf16.bf16_master_weights_and_grads leaves none"):
        check_can_average("generator.ema_decay", bf16)
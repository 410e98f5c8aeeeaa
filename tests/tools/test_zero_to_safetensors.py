"""A checkpoint becomes a folder that stock diffusers loads and samples as this project does."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, sampling_note, to_diffusers
from dmd_ds.generation import VideoModel
from dmd_ds.recipe import REPOSITORY, Sampling, dump_recipe
from dmd_ds.sampler import few_step_schedule, few_step_x0
from dmd_ds.shards import Shards
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.text import encode_prompts
from tools import export, zero_to_safetensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(run) -> Path:
    to_diffusers(find_student(run), run.parent / "student")
    return run.parent / "student"


@pytest.mark.parametrize("weights", ["ema", "trained"])
def test_the_folder_holds_the_average_or_if_wanted_the_trained_weights(run, student, weights):
    checkpoint = run / "checkpoints" / "step_000002"
    folder = student
    if weights == "trained":
        folder = run.parent / "trained"
        to_diffusers(find_student(run, weights="trained"), folder)
    exported = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = Shards(checkpoint / ("ema" if weights == "ema" else "generator"))
    base = load_file(run.parent / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == base.keys()
    moved = 0
    for name, weight in exported.items():
        torch.testing.assert_close(weight, trained.read(f"transformer.{name}"), rtol=0, atol=0)
        moved += int(not torch.equal(weight, base[name]))
    assert moved > 0.9 * len(base)


def test_many_small_files_with_an_index_hold_the_same(run, student):
    split = run.parent / "split"
    to_diffusers(find_student(run), split, largest_file=20000)
    index = json.loads((split / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    whole = load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")
    parts = {}
    for file in set(index["weight_map"].values()):
        parts |= load_file(split / "transformer" / file)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    loaded = VideoModel(str(split), CPU).denoiser.transformer.state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def two_samplers(student: Path, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the stock WanPipeline, which knows nothing of this project, on the same noise."""
    prompt = "a red circle"
    pipeline = WanPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    start = torch.randn(1, 4, 2, 4, 4)
    after = torch.get_rng_state()
    theirs = pipeline(
        prompt, num_inference_steps=steps, guidance_scale=1.0, height=32, width=32, num_frames=5, latents=start, output_type="latent"
    ).frames

    torch.set_rng_state(after)
    draws = [start] + [torch.randn(1, 4, 2, 4, 4) for _ in range(steps)]
    model = VideoModel(str(student), CPU)
    embeds = encode_prompts(model.text, [prompt])[0]
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 8 - len(embeds)))[None]
    denoiser: WanDenoiser = model.denoiser
    schedule = few_step_schedule(model.settings.changed(steps=steps).few_step)
    with torch.no_grad():
        ours = few_step_x0(lambda x, s: denoiser(x, s, padded), lambda k: draws[k], schedule, steps - 1)
    return ours, theirs


def with_sampling(run: Path, sampling: Sampling):
    """The run's student as if it had been trained so."""
    student = find_student(run)
    return dataclasses.replace(student, recipe=student.recipe.model_copy(update={"sampling": sampling}))


def test_stock_diffusers_samples_the_student_as_we_do(student):
    settings = VideoModel(str(student), CPU).settings
    assert (settings.steps, settings.guidance, settings.frames, settings.height) == (4, 1.0, 5, 32)
    torch.testing.assert_close(*two_samplers(student, 4), atol=2e-5, rtol=1e-4)


STOCK = {
    "sde, one step": (Sampling(steps=1), "FlowMatchEulerDiscreteScheduler"),
    "ode": (Sampling(solver="ode"), "FlowMatchEulerDiscreteScheduler"),
    "ode, wan's grid": (Sampling(grid="wan", steps=5, shift=7.0, solver="ode"), "DPMSolverMultistepScheduler"),
    "wan's grid, one step": (Sampling(grid="wan", steps=1), "DPMSolverMultistepScheduler"),
    "a list that is a grid": (Sampling(timesteps=(1000, 750, 500)), "FlowMatchEulerDiscreteScheduler"),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_samples_as_we_do_by_what_the_student_was_trained_with(run, tmp_path, name):
    sampling, scheduler = STOCK[name]
    to_diffusers(with_sampling(run, sampling), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == scheduler
    assert not sampling_note(sampling) and "No scheduler" not in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(*two_samplers(tmp_path / "out", sampling.steps), atol=2e-5, rtol=1e-4)


def test_another_number_of_steps_is_the_same_in_stock_diffusers(run, tmp_path):
    to_diffusers(with_sampling(run, STOCK["ode, wan's grid"][0]), tmp_path / "out")
    for steps in (1, 2, 8):
        torch.testing.assert_close(*two_samplers(tmp_path / "out", steps), atol=2e-5, rtol=1e-4)


def test_what_no_stock_scheduler_can_is_said_and_sampled_by_our_own(run, tmp_path, monkeypatch, capsys):
    """Re-noising on Wan's own grid: what is nearest in stock diffusers, and how far off, is printed and stands in the card."""
    sampling = Sampling(grid="wan", steps=5, shift=7.0)
    checkpoint, out = tmp_path / "step_000002", tmp_path / "out"
    shutil.copytree(run / "checkpoints" / "step_000002", checkpoint)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(with_sampling(run, sampling).recipe))
    for tool in (zero_to_safetensors, export):
        shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", [tool.__name__, str(checkpoint), str(out)])
        tool.main()
        note, folder = capsys.readouterr().out.splitlines()
        assert folder == str(out) and note == sampling_note(sampling)
        assert note.startswith("No scheduler of stock diffusers samples it as it was trained.") and "up to 1 away" in note
        card = (out / "README.md").read_text()
        assert note in card and "at the timesteps 999, 965, 912, 823, 636, noised afresh between them" in card
    model = VideoModel(str(out), CPU)
    assert model.settings.few_step == sampling
    told = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: told.append(round(1000 * float(inputs[1][0]))))
    model.latents(["a red circle"], [0], model.settings)
    assert told == [999, 965, 912, 823, 636]
    ours, theirs = two_samplers(out, 5)
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.02  # near, as the note says, and not the same


def test_validation_left_videos_and_a_contact_sheet(run):
    names = sorted(path.name for path in (run / "samples" / "step_000002").iterdir())
    assert names == [f"00{place}_{weights}.mp4" for place in range(3) for weights in ("ema", "trained")] + ["contact_sheet.png"]
    assert iio.imread(run / "samples" / "step_000002" / "contact_sheet.png").shape[1] > 3 * 5 * 32  # teacher, trained, average


def test_the_command_prints_the_folder_and_one_line_for_a_mistake(run, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "tools/zero_to_safetensors.py", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True
        )

    done = command(run / "checkpoints" / "step_000002", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.strip().endswith("out")
    again = command(run, tmp_path / "out")
    assert again.returncode == 2 and [line for line in again.stderr.splitlines() if "exists already" in line]
    assert "Traceback" not in again.stderr


def test_a_checkpoint_that_lacks_a_rank_is_refused_and_nothing_is_left(run, tmp_path):
    broken = tmp_path / "step_000002"
    shutil.copytree(run / "checkpoints" / "step_000002", broken)
    (broken / "ema" / "rank_00001.safetensors").unlink()
    with pytest.raises(UserError, match="ema/rank_00001.safetensors: missing, written were [0-9]+ bytes"):
        to_diffusers(find_student(broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_an_average_has_none_to_give(run, tmp_path):
    plain = tmp_path / "step_000002"
    shutil.copytree(run / "checkpoints" / "step_000002", plain)
    shutil.rmtree(plain / "ema")
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("ema/")}
    (plain / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trained without generator.ema_decay"):
        find_student(plain, weights="ema")
    assert torch.equal(find_student(plain).read("scale_shift_table"), find_student(run, weights="trained").read("scale_shift_table"))


def test_a_flipped_bit_is_found_before_anything_is_written(run, tmp_path):
    broken = shutil.copytree(run / "checkpoints" / "step_000002", tmp_path / "step_000002")
    file = broken / "ema" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="rank_00001.safetensors: is not what was written .sha256 differs"):
        find_student(broken)
    assert find_student(broken, weights="trained")  # those are whole

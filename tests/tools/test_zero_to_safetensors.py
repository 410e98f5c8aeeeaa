"""A checkpoint becomes a folder that stock diffusers loads and samples as this project does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from dmd_ds.checkpoint import ZeroWeights
from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_diffusers
from dmd_ds.generation import VideoModel
from dmd_ds.recipe import REPOSITORY
from dmd_ds.sampler import few_step_sigmas, few_step_x0
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.text import encode_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(run) -> Path:
    to_diffusers(find_student(run), run.parent / "student")
    return run.parent / "student"


def test_the_folder_holds_the_trained_weights(run, student):
    exported = load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = ZeroWeights(run / "checkpoints" / "step_000002" / "generator")
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


def test_stock_diffusers_samples_the_student_as_we_do(student):
    """Same noise, two samplers: WanPipeline knows nothing of this project."""
    prompt, steps = "a red circle", 4
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
    assert (model.settings.steps, model.settings.guidance, model.settings.frames, model.settings.height) == (4, 1.0, 5, 32)
    embeds = encode_prompts(model.text, [prompt])[0]
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 8 - len(embeds)))[None]
    denoiser: WanDenoiser = model.denoiser
    with torch.no_grad():
        ours = few_step_x0(lambda x, s: denoiser(x, s, padded), lambda k: draws[k], few_step_sigmas(model.settings.few_step), steps - 1)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_validation_left_videos_and_a_contact_sheet(run):
    names = sorted(path.name for path in (run / "samples" / "step_000002").iterdir())
    assert names == ["000.mp4", "001.mp4", "002.mp4", "contact_sheet.png"]


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
    (broken / "generator" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="1 rank files of 2"):
        to_diffusers(find_student(broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_nvme_offload_left_elsewhere_are_named(run, tmp_path):
    broken = shutil.copytree(run / "checkpoints" / "step_000002", tmp_path / "step_000002")
    for file in (broken / "generator").glob("*_optim_states.pt"):
        content = torch.load(file, weights_only=False)
        content["optimizer_state_dict"]["fp32_flat_groups"] = [torch.empty(0)]
        torch.save(content, file)
    with pytest.raises(UserError, match="generator: its weights were on NVMe and lie in offloaded_tensors"):
        find_student(broken)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(run, tmp_path):
    broken = tmp_path / "step_000002"
    shutil.copytree(run / "checkpoints" / "step_000002", broken)

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"param_shapes": Attack()}, broken / "generator" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="model_states.pt: not readable"):
        to_diffusers(find_student(broken), tmp_path / "out")
    assert not (tmp_path / "ran").exists()

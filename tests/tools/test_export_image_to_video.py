"""An image-to-video checkpoint becomes a folder that the stock pipeline loads and samples as this project does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from PIL import Image

from dmd_ds.export import find_student, to_diffusers
from dmd_ds.generation import VideoModel
from dmd_ds.sampler import few_step_schedule, few_step_x0
from dmd_ds.wan.text import encode_prompts
from tests.distributed.launch import train
from tests.mini import IMAGE_EMBEDS_SHAPE, make_dataset, make_image_pipeline, make_recipe

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on two ranks, with a look at the generator."""
    folder = tmp_path_factory.mktemp("export_image")
    make_image_pipeline(folder / "model")
    make_dataset(folder / "data", image_embeds_shape=IMAGE_EMBEDS_SHAPE)
    recipe = make_recipe(folder, max_steps=2, data={"batch_size": 1}, validation={"every": 2, "prompts": 3})
    train(recipe, ranks=2)
    return Path(recipe.output_dir)


@pytest.fixture(scope="module")
def student(run) -> Path:
    to_diffusers(find_student(run), run.parent / "student")
    return run.parent / "student"


def test_validation_left_its_videos(run):
    names = sorted(path.name for path in (run / "samples" / "step_000002").iterdir())
    assert names == ["000_trained.mp4", "001_trained.mp4", "002_trained.mp4", "contact_sheet.png"]


def test_the_folder_is_an_image_to_video_pipeline_with_its_encoder_and_card(run, student):
    index = json.loads((student / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for file in ("image_encoder/model.safetensors", "image_processor/preprocessor_config.json"):
        assert (student / file).read_bytes() == (run.parent / "model" / file).read_bytes()
    card = (student / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "WanImageToVideoPipeline.from_pretrained" in card and "pipeline(image, prompt" in card
    assert isinstance(DiffusionPipeline.from_pretrained(student), WanImageToVideoPipeline)


def test_stock_diffusers_samples_the_student_as_we_do(student):
    """Same noise and image, two samplers: the stock pipeline knows nothing of this project."""
    prompt, picture = "a red circle", np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    pipeline = WanImageToVideoPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    start = torch.randn(1, 4, 2, 4, 6)
    after = torch.get_rng_state()
    size = {"height": 32, "width": 48, "num_frames": 5}

    def theirs(picture):
        torch.set_rng_state(after)
        image = Image.fromarray(picture)
        return pipeline(image, prompt, num_inference_steps=STEPS, guidance_scale=1.0, latents=start, output_type="latent", **size).frames

    expected = theirs(picture)
    torch.set_rng_state(after)
    draws = [start] + [torch.randn(1, 4, 2, 4, 6) for _ in range(STEPS)]
    model = VideoModel(str(student), torch.device("cpu"))
    settings = model.settings.changed(width=48)
    assert (settings.steps, settings.guidance, settings.frames, settings.height) == (STEPS, 1.0, 5, 32)
    embeds = encode_prompts(model.text, [prompt])[0]
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 8 - len(embeds)))[None]
    image = model.condition([picture], settings)
    with torch.no_grad():
        ours = few_step_x0(
            lambda x, s: model.denoiser(x, s, padded, image=image), lambda k: draws[k], few_step_schedule(settings.few_step), STEPS - 1
        )
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    assert (theirs(255 - picture) - expected).abs().max() > 1e-2

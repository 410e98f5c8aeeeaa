"""Batch inference from images: each video has its own first frame, and a mistake is one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_ds.data.video import read_image
from dmd_ds.errors import UserError
from dmd_ds.generation import VideoModel
from dmd_ds.recipe import REPOSITORY
from inference.generate import Job, read_jobs

SIZE = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--guidance", "2", "--fps", "8"]


@pytest.fixture
def images(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(draw.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def command(model: Path, prompts: Path, *arguments: str) -> subprocess.CompletedProcess:
    files = ["--model", str(model), "--prompts", str(prompts), "--out", str(prompts.parent / "out")]
    return subprocess.run(
        [sys.executable, "inference/generate.py", *files, *SIZE, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_a_lines_image_goes_before_the_commands(images):
    lines = [{"prompt": "one"}, {"prompt": "two", "image": "b.png", "seed": 70}]
    (images / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (images / "p.txt").write_text("one\n")
    given = Path("elsewhere/a.png")
    assert read_jobs(images / "p.jsonl", 5, given) == [Job("one", 5, given), Job("two", 70, images / "b.png")]
    assert read_jobs(images / "p.txt", 5, given) == [Job("one", 5, given)]
    (images / "p.jsonl").write_text('{"prompt": "one", "image": 3}')
    with pytest.raises(UserError, match="p.jsonl:1: image=3 is not a file's name"):
        read_jobs(images / "p.jsonl", 5)


def test_the_command_makes_a_video_an_image_and_the_manifest_names_it(mini_image_model, images):
    lines = [{"prompt": "a red circle", "seed": 1}, {"prompt": "a red circle", "seed": 1, "image": "b.png"}]
    (images / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(mini_image_model, images / "p.jsonl", "--image", str(images / "a.png"))
    assert done.returncode == 0 and "2 videos made, 0 were there" in done.stdout, done.stderr
    manifest = [json.loads(line) for line in (images / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["image"] for line in manifest] == [str(images / "a.png"), str(images / "b.png")]
    (images / "a.png").write_bytes((images / "b.png").read_bytes())  # another picture under the old name is another video
    again = command(mini_image_model, images / "p.jsonl", "--image", str(images / "a.png"))
    assert "1 videos made, 1 were there" in again.stdout, again.stderr


def test_a_sample_depends_on_its_own_image_and_not_on_its_batch(mini_image_model, images):
    model = VideoModel(str(mini_image_model), torch.device("cpu"))
    settings = model.settings.changed(steps=2, guidance=2.0, frames=5, height=32, width=32)
    pictures = [read_image(images / name, 32, 32) for name in ("a.png", "b.png")]
    together = model.latents(["a", "a"], [1, 1], settings, image=model.condition(pictures, settings))
    alone = [model.latents(["a"], [1], settings, image=model.condition([picture], settings)) for picture in pictures]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    with pytest.raises(UserError, match="an image-to-video model, which needs an image a video"):
        model.latents(["a"], [1], settings)


@pytest.mark.parametrize(
    "image, message",
    [
        (None, 'prompt 1: --model {model} needs an image; give --image FILE, or "image" in its line'),
        ("gone.png", "gone.png: no such file"),
        ("p.txt", "p.txt: not readable as an image"),
    ],
)
def test_a_missing_or_broken_image_is_one_line(mini_image_model, images, image, message):
    (images / "p.txt").write_text("a red circle\n")
    given = ["--image", str(images / image)] if image else []
    done = command(mini_image_model, images / "p.txt", *given)
    assert done.returncode == 2 and message.format(model=mini_image_model) in done.stderr and "Traceback" not in done.stderr


def test_a_text_to_video_model_takes_no_image(mini_model, images):
    (images / "p.txt").write_text("a red circle\n")
    done = command(mini_model, images / "p.txt", "--image", str(images / "a.png"))
    assert done.returncode == 2 and f"--model {mini_model} makes videos from text and takes no image" in done.stderr

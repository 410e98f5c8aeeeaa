"""Inference on several ranks makes the videos that one rank makes, whether they share each video or each makes its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from dmd_ds.data.video import read_video
from tests.distributed.launch import assert_fine, run_ranks

FRAMES, HEIGHT, WIDTH = 5, 32, 48  # 2 x 2 x 3 tokens
PROMPTS = ["a red circle", "a blue square", "a red square"]


def test_a_shared_video_is_the_same_to_one_level_of_a_pixel(mini_model):
    results = run_ranks(2, "-m", "tests.distributed.inference_ranks", str(mini_model), *PROMPTS)
    assert_fine(results)
    found = json.loads(results[0].stdout.splitlines()[-1])
    assert found.pop("prompts") > 10
    assert len(found) == 2 and max(found.values()) <= 1, found


def make_videos(model: Path, folder: Path, ranks: int, *degrees: str) -> dict[str, np.ndarray]:
    """The videos in the folder by prompt, in [0, 255]."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--model", str(model), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out"), "--fps", "8"]
    size = ["--frames", str(FRAMES), "--height", str(HEIGHT), "--width", str(WIDTH), "--steps", "3", "--guidance", "2"]
    results = run_ranks(ranks, "inference/generate.py", *options, *size, *degrees)
    assert_fine(results)
    assert f"{folder / 'out'}: 3 videos made, 0 were there" in results[0].stdout
    lines = [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]
    assert len(list((folder / "out").iterdir())) == len(PROMPTS) + 2
    return {line["prompt"]: read_video(folder / "out" / line["file"], FRAMES, HEIGHT, WIDTH, 8).astype(float) for line in lines}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(scope="module")
def alone(world, mini_model):
    return make_videos(mini_model, world / "alone", 1)


@pytest.mark.parametrize("degrees", [["--ulysses", "2"], ["--ring", "2"], []], ids=["ulysses", "ring", "a video each"])
def test_the_files_are_those_of_one_rank(world, mini_model, alone, degrees):
    videos = make_videos(mini_model, world / "-".join(["several", *degrees]), 2, *degrees)
    assert list(videos) == PROMPTS
    for prompt, video in videos.items():  # mp4 is lossy: one level in a pixel can move a whole block of them by a few
        assert np.abs(video - alone[prompt]).mean() < 0.5, prompt
    assert np.abs(alone[PROMPTS[0]] - alone[PROMPTS[1]]).mean() > 1.5

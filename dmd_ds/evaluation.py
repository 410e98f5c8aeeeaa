"""What a model is worth on the moving shapes: the judge's shares and means, the Fréchet distance, seconds and evaluations."""

import dataclasses
import time

import numpy as np

from dmd_ds.data import moving_shapes
from dmd_ds.generation import Settings, VideoModel
from dmd_ds.recipe import PACKAGE

REFERENCE = PACKAGE / "assets" / "tiny-wan" / "reference.safetensors"
COLUMNS = ("color", "shape", "motion", "both", "speed", "sharpness", "saturation", "frechet", "seconds", "evaluations")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    videos: list[np.ndarray]
    numbers: dict[str, float]


def caption_list(count: int) -> list[str]:
    """Every caption in turn, as often as it takes."""
    return [str(moving_shapes.CAPTIONS[i % len(moving_shapes.CAPTIONS)]) for i in range(count)]


def evaluate(
    model: VideoModel, prompts: list[str], first_seed: int, settings: Settings, reference_NF: np.ndarray | None = None, batch_size: int = 27
) -> Evaluation:
    """Videos of the prompts, sample i with seed `first_seed` + i, and what they are worth.

    `seconds` and `evaluations` are a video's: time in sampling and decoding, forwards of the denoiser.
    """
    videos, began = [], time.monotonic()
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = [first_seed + start + i for i in range(len(part))]
        videos += list(model.videos(part, seeds, settings).numpy())
    seconds = (time.monotonic() - began) / len(prompts)
    numbers = moving_shapes.score([moving_shapes.judge(video) for video in videos], prompts)
    if reference_NF is not None:
        features_NF = np.stack([moving_shapes.features(video) for video in videos])
        numbers["frechet"] = moving_shapes.frechet_distance(features_NF, reference_NF)
    return Evaluation(videos, {**numbers, "seconds": seconds, "evaluations": model.evaluations(settings)})


def table(rows: dict[str, dict[str, float]]) -> str:
    """The numbers as a text table, a row a model."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, numbers in rows.items():
        lines.append(name.ljust(width) + "".join(f"{numbers[column]:>12.3f}" for column in COLUMNS))
    return "\n".join(lines)

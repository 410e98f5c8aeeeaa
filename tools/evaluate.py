#!/usr/bin/env python3
"""Judges what a model makes of the moving shapes: right colour, shape and motion, and the Fréchet distance to the teacher.

    python tools/evaluate.py MODEL [--prompts 108] [--seed 1000] [--steps N] [--guidance W] [--reference FEATURES]

Prints a table and, with --json FILE, writes it. The reference is a kept set of features of the guided teacher's videos
(default: the one of the shipped tiny-wan).
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from dmd_ds.data import moving_shapes
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.generation import Settings, VideoModel
from dmd_ds.recipe import PACKAGE

REFERENCE = PACKAGE / "assets" / "tiny-wan" / "reference.safetensors"
COLUMNS = ("color", "shape", "motion", "both", "speed", "sharpness", "saturation", "frechet", "seconds", "evaluations")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    videos: list[np.ndarray]
    numbers: dict[str, float]


def read_reference(path: Path) -> np.ndarray:
    """Features `[N, F]` of the kept set."""
    if not path.is_file():
        raise UserError(f"--reference {path}: no such file")
    return load_file(path)["features"].astype(np.float64)


def captions(count: int) -> list[str]:
    """Every caption in turn, as often as it takes."""
    return [str(moving_shapes.CAPTIONS[i % len(moving_shapes.CAPTIONS)]) for i in range(count)]


def evaluate(
    model: VideoModel, prompts: list[str], first_seed: int, settings: Settings, reference_NF: np.ndarray | None, batch_size: int = 27
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
    numbers = moving_shapes.score(videos, prompts)
    if reference_NF is not None:
        features_NF = np.stack([moving_shapes.features(video) for video in videos])
        numbers["frechet"] = moving_shapes.frechet_distance(features_NF, reference_NF)
    return Evaluation(videos, {**numbers, "seconds": seconds, "evaluations": settings.evaluations})


def table(rows: dict[str, dict[str, float]]) -> str:
    """The numbers as a text table, a row a model."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, numbers in rows.items():
        lines.append(name.ljust(width) + "".join(f"{numbers[column]:>12.3f}" for column in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=2 * len(moving_shapes.CAPTIONS), help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with one_line_errors():
        reference_NF = read_reference(a.reference)
        model = VideoModel(a.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        settings = model.settings.changed(steps=a.steps, guidance=a.guidance)
        numbers = evaluate(model, captions(a.prompts), a.seed, settings, reference_NF).numbers
    print(table({a.model: numbers}))
    if a.json:
        a.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()

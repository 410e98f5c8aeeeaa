#!/usr/bin/env python3
"""Judges what a model makes of the moving shapes: right colour, shape and motion, and the Fréchet distance to the teacher.

    python tools/evaluate.py MODEL [--prompts 108] [--seed 1000] [--steps N] [--guidance W] [--reference FEATURES]

Prints a table and, with --json FILE, writes it. The reference is a kept set of features of the guided teacher's videos
(default: the one of the shipped tiny-wan).
"""

import argparse
import json
from pathlib import Path

import torch

from dmd_ds.checkpoint import write_whole
from dmd_ds.data import moving_shapes
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.evaluation import REFERENCE, caption_list, evaluate, table
from dmd_ds.generation import VideoModel


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
        if a.prompts < 2:
            raise UserError(f"--prompts {a.prompts}: a Fréchet distance takes at least 2")
        reference_NF = moving_shapes.read_features(a.reference)
        model = VideoModel(a.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        settings = model.settings.changed(steps=a.steps, guidance=a.guidance)
        numbers = evaluate(model, caption_list(a.prompts), a.seed, settings, reference_NF).numbers
    print(table({a.model: numbers}))
    if a.json:
        write_whole(a.json, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Clips of the moving shapes as files, as anyone's own clips would lie there: mp4, and a clips.jsonl with their captions."""

import json
import shutil
from pathlib import Path

import numpy as np

from dmd_ds.data import moving_shapes
from dmd_ds.data.video import write_video
from dmd_ds.errors import UserError


def write_clips(folder: Path, count: int, seed: int = 0, height: int = moving_shapes.HEIGHT, width: int = moving_shapes.WIDTH) -> None:
    """So many clips, of every caption in turn; the folder has its name only when it is whole. `UserError` for one that is there."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; name another folder or remove it")
    rng = np.random.default_rng(seed)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    lines = []
    for number in range(count):
        name, caption = f"{number:04d}.mp4", moving_shapes.CAPTIONS[number % len(moving_shapes.CAPTIONS)]
        write_video(unfinished / name, moving_shapes.draw(caption, rng, height=height, width=width), moving_shapes.FPS)
        lines.append(json.dumps({"video_path": name, "caption": str(caption)}))
    (unfinished / "clips.jsonl").write_text("\n".join(lines) + "\n")
    unfinished.rename(folder)

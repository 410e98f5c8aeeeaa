"""A run's folder as training leaves it, written by hand: numbers, warnings, videos, what it was started with."""

import json
from pathlib import Path

import numpy as np

from dmd_ds.data.video import write_video
from dmd_ds.recipe import dump_recipe, load_recipe

LOOKS = (2, 4, 6)
PROMPTS = ["a red circle", "</script><script>window.broken = true</script>"]  # the second is text, whatever it looks like


def film(brightness: int) -> np.ndarray:
    return np.full((5, 32, 32, 3), brightness, np.uint8)


def make_run(folder: Path, steps: int = 6, looks: tuple[int, ...] = LOOKS, prompts: list[str] = PROMPTS, seed: int = 0) -> Path:
    """`looks`: the steps at which it was looked at; each video's brightness tells them apart."""
    recipe = load_recipe("tiny", [f"output_dir={folder}", "max_steps=6", f"seed={seed}"])
    samples = folder / "samples"
    for name, brightness in (("teacher", 10), ("undistilled", 20)):
        (samples / name).mkdir(parents=True)
        for place in range(len(prompts)):
            write_video(samples / name / f"{place:03d}.mp4", film(brightness + 5 * place), 8)
    numbers = {"teacher": {"drift": 0.0, "frechet": 1.0}, "undistilled": {"drift": 0.5, "frechet": 9.0}}
    (samples / "teacher" / "measures.json").write_text(json.dumps({"numbers": numbers}))
    (samples / "prompts.json").write_text(json.dumps(prompts))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss/dm": None if step == 3 else 1 / step, "seconds": 0.5, "memory_gb": 2.0}
        if step in looks:
            line |= {f"validation/{weights}/{what}": 0.3 / step for weights in ("trained", "ema") for what in ("drift", "drift_motion")}
            (samples / f"step_{step:06d}").mkdir()
            for place in range(len(prompts)):
                for shift, weights in ((0, "trained"), (3, "ema")):
                    write_video(samples / f"step_{step:06d}" / f"{place:03d}_{weights}.mp4", film(60 + 20 * step + 7 * place + shift), 8)
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "loss')  # the last one is being written
    (folder / "warnings.jsonl").write_text(json.dumps({"step": 4, "warning": "motion is off"}) + "\n")
    rank = {"host": "a", "device": "CPU", "device_memory_gb": None, "cpu": "x", "cores": 2, "host_memory_gb": 8.0, "resident_gb": 0.5}
    plan = {"peak_phase": "validation: decoding", "always": {"weights": 1e9}, "phases": {"validation: decoding": {"video": 2e8}}}
    start = {"time": "t", "step": 0, "command": ["train.py"], "summary": ["model m", "data d", "sigmas 1 0"], "planned": plan}
    start |= {"ranks": [rank], "split": {"data": 1}, "versions": {"torch": "2"}}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder

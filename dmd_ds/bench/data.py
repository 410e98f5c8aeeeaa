"""Clips encoded a second, samples loaded a second, and the share of a step that waits for data.

Clips are moving shapes, encoded by the tiny Wan2.1 that ships. Samples are of 1280x720x81 videos, 19 MB of float32 latents each,
with their checksums compared. The share is that of the trainer on the world of the other parts, with a GAN, which looks at latents.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, recipe_of, trainer_of, write_data, written
from dmd_ds.data.clips import write_clips
from dmd_ds.data.latents import LatentsDataset
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import REPOSITORY, Parallel

HD = World(frames=21, height=90, width=160, text=120)


def encoding(folder: Path, clips: int) -> dict[str, float]:
    """Clips a second by `tools/encode_videos.py`, with its start, decoded in turn and ahead, one and four at once."""
    write_clips(folder / "clips", clips, height=256, width=256)
    found = {}
    for workers, batch in ((1, 1), (2, 1), (2, 4)):
        command = [sys.executable, "tools/encode_videos.py", folder / "clips" / "clips.jsonl", folder / f"out-{workers}-{batch}"]
        command += ["--model", "tiny-wan", "--sizes", "17x64x64", "--fps", "8", "--workers", workers, "--batch", batch]
        began = time.perf_counter()
        subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True, capture_output=True)
        found[f"{workers} decoding, {batch} at once"] = clips / (time.perf_counter() - began)
    return found


def loading(folder: Path, samples: int) -> float:
    """Samples a second from files that the system has at hand."""
    write_data(folder / "hd", HD, samples)
    dataset = LatentsDataset(str(folder / "hd"))
    seconds = []
    for index in [*range(samples), *range(samples)]:
        began = time.perf_counter()
        dataset[index].latents.to(torch.float32)
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[samples:])


def on_rank(world: dict, folder: str, steps: int) -> dict[str, float]:
    """Seconds of the trainer's steps, and those in which it makes their batches."""
    world = World(**world)
    with joined(Parallel()) as mesh:
        trainer = trainer_of(world, recipe_of(world, folder, gan={"generator_weight": 0.1}), mesh)
        waited, batches_of = 0.0, trainer.batches

        def timed_batches(step: int):
            nonlocal waited
            began = time.perf_counter()
            batches = batches_of(step)
            waited += time.perf_counter() - began
            return batches

        trainer.step(0)
        trainer.batches = timed_batches
        began = time.perf_counter()
        for step in range(1, 1 + steps):
            trainer.step(step)
        whole = time.perf_counter() - began
        trainer.monitor.close()
    return {"steps": steps, "seconds": whole, "waited": waited}


def measure(world: World, clips: int = 54, samples: int = 6, steps: int = 10) -> dict:
    with written(world) as folder:
        step = run_ranks("data", 1, world=world.__dict__, folder=folder, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        return {"step": step, "clips_a_second": encoding(Path(folder), clips), "samples_a_second": loading(Path(folder), samples)}


def table(found: dict) -> str:
    step, samples = found["step"], found["samples_a_second"]
    lines = ["| | |", "|---|---|"]
    lines += [f"| clips encoded a second: {how} | {rate:.2f} |" for how, rate in found["clips_a_second"].items()]
    lines.append(f"| samples of 1280x720x81 loaded a second | {samples:.1f} |")
    lines.append(f"| share of a step that waits for data | {step['waited'] / step['seconds']:.2%} |")
    return "\n".join(lines)

"""What a run tells while it runs: metrics.jsonl, warnings.jsonl, the recipe's trackers, its progress. Only the first rank writes."""

import contextlib
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dmd_ds.checkpoint import write_whole
from dmd_ds.progress import Progress
from dmd_ds.recipe import Recipe
from dmd_ds.trackers import open_trackers

OF_THE_MACHINE = ("seconds", "memory_gb")  # numbers that tell of it and not of the training, whose others repeat exactly


def peak_memory_gb() -> float:
    """The most that the accelerator's allocator gave out at once so far; without one, that the process had in memory."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Monitor:
    """Takes back what was logged after `first_step`: a resumed run takes these steps again."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int, writes: bool):
        self.writes = writes
        self.began = time.monotonic()
        if not writes:
            return
        self.metrics, self.warnings = run / "metrics.jsonl", run / "warnings.jsonl"
        for file in (self.metrics, self.warnings):
            if file.is_file():
                lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_whole(file, "".join(line for line in lines if json.loads(line)["step"] <= first_step))
        self.file = self.metrics.open("a", buffering=1)
        self.trackers = open_trackers(run, recipe, first_step)
        self.progress = Progress(first_step, recipe.max_steps)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line for `step` (the number of steps finished), with the seconds since the last and the memory so far."""
        now = time.monotonic()
        seconds, self.began = now - self.began, now
        if not self.writes:
            return
        numbers = values | dict(zip(OF_THE_MACHINE, (seconds, peak_memory_gb()), strict=True))
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}  # JSON knows no other numbers
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        for tracker in self.trackers:
            tracker.log(step, numbers)
        self.progress.advance(step, numbers)

    def warn(self, step: int, text: str) -> None:
        """Says it and keeps it in warnings.jsonl."""
        if not self.writes:
            return
        self.progress.say(f"warning: step {step}: {text}")
        with self.warnings.open("a") as file:
            file.write(json.dumps({"step": step, "warning": text}) + "\n")

    def say(self, text: str) -> None:
        if self.writes:
            self.progress.say(text)

    def close(self) -> None:
        if self.writes:
            self.file.close()
            for tracker in self.trackers:
                tracker.close()
            self.progress.close()


@contextlib.contextmanager
def log_of_other_ranks(run: Path, rank: int) -> Iterator[None]:
    """What the ranks but the first print, and their warnings, go to `logs/rank_00001.log` of the run; errors still to stderr."""
    if rank == 0:
        yield
        return
    file = run / "logs" / f"rank_{rank:05d}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    stdout, show = os.dup(1), warnings.showwarning

    def into_the_log(message, category, filename, lineno, file=None, line=None):
        show(message, category, filename, lineno, sys.stdout, line)

    with file.open("a") as log:
        os.dup2(log.fileno(), 1)
        warnings.showwarning = into_the_log
        try:
            yield
        finally:
            warnings.showwarning = show
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)

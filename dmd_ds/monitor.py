"""What a run tells while it runs: metrics.jsonl, warnings.jsonl, TensorBoard, a progress bar. Only the first rank writes."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dmd_ds.checkpoint import write_whole


class Monitor:
    def __init__(self, run: Path, first_step: int, max_steps: int, writes: bool):
        self.writes = writes
        self.began = time.monotonic()
        if not writes:
            return
        self.metrics, self.warnings = run / "metrics.jsonl", run / "warnings.jsonl"
        for file in (self.metrics, self.warnings):
            if file.is_file():  # steps after the checkpoint that a resumed run takes again
                lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_whole(file, "".join(line for line in lines if json.loads(line)["step"] <= first_step))
        self.file = self.metrics.open("a", buffering=1)
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)
        self.bar = tqdm(initial=first_step, total=max_steps, unit="step", file=sys.stdout, mininterval=10, ncols=110)

    def log(self, step: int, values: dict[str, torch.Tensor | float]) -> None:
        """One line for `step` (the number of steps finished), with the seconds since the last."""
        now = time.monotonic()
        seconds, self.began = now - self.began, now
        if not self.writes:
            return
        numbers = {name: float(value) for name, value in values.items()} | {"seconds": seconds}
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}  # JSON knows no other numbers
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, number in numbers.items():
            self.tensorboard.add_scalar(name, number, step)
        self.bar.set_postfix({name: f"{number:.3g}" for name, number in numbers.items() if name.startswith("loss")}, refresh=False)
        self.bar.update()

    def warn(self, step: int, text: str) -> None:
        """Says it above the progress bar and keeps it in warnings.jsonl."""
        if not self.writes:
            return
        tqdm.write(f"warning: step {step}: {text}", file=sys.stdout)
        with self.warnings.open("a") as file:
            file.write(json.dumps({"step": step, "warning": text}) + "\n")

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.writes:
            tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        if self.writes:
            self.file.close()
            self.tensorboard.close()
            self.bar.close()

"""The sample videos of a report, as base64 within a number of bytes: the teacher's and the undistilled model's, and looks spread
evenly over the steps, the last one always."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmd_ds.report.runs import RunFolder
from dmd_ds.validation import EMA, TEACHER, TRAINED, UNDISTILLED

Cells = dict[str, int | None]  # by column, the number of a video


@dataclasses.dataclass
class Videos:
    """The page's videos, each once; `number` gives its place among them."""

    content: list[str] = dataclasses.field(default_factory=list)
    places: dict[bytes, int] = dataclasses.field(default_factory=dict)

    def number(self, file: Path) -> int:
        content = file.read_bytes()
        if content not in self.places:
            self.places[content] = len(self.content)
            self.content.append(base64.b64encode(content).decode())
        return self.places[content]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the page shows: a row a prompt; of every row the fixed videos, and by run, step and weights the others."""

    prompts: list[str]
    fixed: dict[str, list[int]]  # the teacher's and the undistilled model's, a row each
    looks: list[dict[int, dict[str, list[int | None]]]]  # of each run, by step, by weights, a row each
    steps: list[int]
    left_out: str  # what the page has no room for, in words


def size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def evenly(steps: list[int], count: int) -> list[int]:
    """So many of them, the first and the last among them; the last alone of one."""
    if count >= len(steps):
        return steps
    return [steps[i] for i in np.linspace(0 if count > 1 else len(steps) - 1, len(steps) - 1, count).round().astype(int)]


def weights_of(run: RunFolder) -> list[str]:
    return [EMA, TRAINED] if run.student == EMA else [TRAINED]


def files_of(run: RunFolder, weights: list[str], steps: list[int], rows: int) -> list[Path]:
    return [file for step in steps for name in weights for file in run.videos(name, step)[:rows]]


def chosen_steps(run: RunFolder, weights: list[str], rows: int, most_bytes: int) -> list[int]:
    """As many looks as fit."""
    steps = [step for step in run.looks if all(run.videos(name, step) for name in weights)]
    for count in range(len(steps), 0, -1):
        if size(files_of(run, weights, some := evenly(steps, count), rows)) <= most_bytes:
            return some
    return []


def gather(runs: Sequence[RunFolder], most_bytes: int, videos: Videos) -> Samples | None:
    """The samples of these runs; None where there is no video, or not one that fits.

    Of several runs the student's weights alone; rows are the first run's prompts, a run that has one of them not leaves it blank.
    """
    first = next((run for run in runs if run.prompts), None)
    if first is None:
        return None
    kept = {name: run.videos(name) for name in (TEACHER, UNDISTILLED) for run in runs[:1]}
    kept = {name: files for name, files in kept.items() if files}
    for rows in range(len(first.prompts), 0, -1):
        room = most_bytes - sum(size(files[:rows]) for files in kept.values())
        weights = [weights_of(run) if len(runs) == 1 else [run.student] for run in runs]
        chosen = [chosen_steps(run, names, rows, room // len(runs)) for run, names in zip(runs, weights, strict=True)]
        if all(steps for steps, run in zip(chosen, runs, strict=True) if run.looks):
            break
    else:
        return None
    prompts = first.prompts[:rows]

    def look(run: RunFolder, name: str, step: int) -> list[int | None]:
        files = dict(zip(run.prompts, run.videos(name, step), strict=True))
        return [videos.number(files[prompt]) if prompt in files else None for prompt in prompts]

    return Samples(
        prompts=prompts,
        fixed={name: [videos.number(file) for file in files[:rows]] for name, files in kept.items()},
        looks=[
            {step: {name: look(run, name, step) for name in names} for step in steps}
            for run, names, steps in zip(runs, weights, chosen, strict=True)
        ],
        steps=sorted({step for steps in chosen for step in steps}),
        left_out=left_out(runs, chosen, len(first.prompts), rows, most_bytes),
    )


def left_out(runs: Sequence[RunFolder], chosen: list[list[int]], prompts: int, rows: int, most_bytes: int) -> str:
    there, shown = sum(len(run.looks) for run in runs), sum(map(len, chosen))
    if (there, prompts) == (shown, rows):
        return ""
    return f"Shown are {shown} of {there} looks and {rows} of {prompts} prompts, to keep the page's videos below {most_bytes / 1e6:.0f} MB."

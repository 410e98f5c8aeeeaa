"""What a model is worth on the moving shapes: the judge's shares and means, the Fréchet distance, the spread within a caption,
seconds and evaluations; students and their teacher side by side, at several numbers of steps."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from dmd_ds.charts import Panel
from dmd_ds.data import moving_shapes
from dmd_ds.generation import Settings, VideoModel
from dmd_ds.recipe import PACKAGE
from dmd_ds.rewards import Reward, check_scores
from dmd_ds.source import Source

REFERENCE = PACKAGE / "assets" / "tiny-wan" / "reference.safetensors"
COLUMNS = ("color", "shape", "motion", "both", "speed", "sharpness", "saturation", "frechet", "seconds", "evaluations")
COMPARED = ("gap_closed", "diversity")  # to the teacher: columns of a comparison alone
SPREADS = ("size_spread", "path_spread", "start_spread")
RATIOS = ("both", "speed", "saturation", *SPREADS)  # to the teacher, each as NAME_of_teacher
SHOWN = 6  # videos of an evaluation that are kept, for the contact sheet
OTHER_SEEDS = 5_000_000  # from the judged videos' seeds to those of a reference that is made here


@dataclasses.dataclass(frozen=True)
class Evaluation:
    videos: list[np.ndarray]
    features_NF: np.ndarray
    numbers: dict[str, float]


def caption_list(count: int, captions: Sequence[moving_shapes.Caption] = moving_shapes.CAPTIONS) -> list[str]:
    """Every caption in turn, as often as it takes."""
    return [str(captions[i % len(captions)]) for i in range(count)]


def evaluate(
    model: VideoModel,
    prompts: list[str],
    first_seed: int,
    settings: Settings,
    reference_NF: np.ndarray | None = None,
    batch_size: int = 27,
    rewards: Mapping[str, Reward] = MappingProxyType({}),
) -> Evaluation:
    """Videos of the prompts, sample i with seed `first_seed` + i, and what they are worth; of `rewards` the means, by name.

    `seconds` and `evaluations` are a video's: time in sampling and decoding, forwards of the denoiser.
    """
    videos, began = [], time.monotonic()
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = [first_seed + start + i for i in range(len(part))]
        videos += list(model.videos(part, seeds, settings).numpy())
    seconds = (time.monotonic() - began) / len(prompts)
    verdicts = [moving_shapes.judge(video) for video in videos]
    numbers = moving_shapes.score(verdicts, prompts) | moving_shapes.diversity(verdicts, prompts)
    for name, reward in rewards.items():
        numbers[name] = mean_reward(reward, videos, prompts)
    features_NF = np.stack([moving_shapes.features(video) for video in videos])
    if reference_NF is not None:
        numbers["frechet"] = moving_shapes.frechet_distance(features_NF, reference_NF)
    return Evaluation(videos, features_NF, {**numbers, "seconds": seconds, "evaluations": model.evaluations(settings)})


@torch.no_grad()
def mean_reward(reward: Reward, videos: list[np.ndarray], prompts: list[str]) -> float:
    """Of all frames of uint8 videos, one video at a time."""
    scores = []
    for video, prompt in zip(videos, prompts, strict=True):
        frames_1T3HW = torch.from_numpy(video)[None].permute(0, 1, 4, 2, 3) / 255
        scores.append(float(check_scores("a reward", reward(frames_1T3HW, [prompt]), 1)))
    return float(np.mean(scores))


def table(rows: dict[str, dict[str, float]], columns: tuple[str, ...] = COLUMNS) -> str:
    """The numbers as a text table, a row a model; a dash where there is none."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column.rpartition(':')[2]:>12}" for column in columns)]  # of a reward, its function
    for name, numbers in rows.items():
        cells = [f"{numbers[column]:.3f}" if column in numbers else "-" for column in columns]
        lines.append(name.ljust(width) + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


# ---- several models, each evaluated once ------------------------------------------------------------------------------


class Evaluator:
    """Evaluates sources on the same captions and seeds, and keeps what it found in a folder, so nothing is made twice."""

    def __init__(
        self,
        prompts: list[str],
        first_seed: int,
        cache: Path,
        device: torch.device,
        batch_size: int,
        rewards: Mapping[str, Reward] = MappingProxyType({}),
    ):
        self.rewards = rewards
        self.prompts, self.first_seed, self.cache, self.device, self.batch_size = prompts, first_seed, cache, device, batch_size
        self.loaded: tuple[Source, VideoModel] | None = None

    def __call__(self, source: Source, settings: Settings, seeds_from: int = 0) -> Evaluation:
        """`seeds_from`: added to every seed. Of the videos the first `SHOWN` stay."""
        first_seed = self.first_seed + seeds_from
        key = json.dumps([source.mark, settings.model_dump(mode="json"), self.prompts, first_seed, *self.rewards])
        file = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file():
            print(f"sampling {len(self.prompts)} videos in {settings.steps} steps: {source.name}", flush=True)
            found = evaluate(self.model(source), self.prompts, first_seed, settings, batch_size=self.batch_size, rewards=self.rewards)
            self.cache.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".tmp")
            tensors = {"features": found.features_NF, "videos": np.stack(found.videos[:SHOWN])}
            save_file(tensors, unfinished, metadata={"numbers": json.dumps(found.numbers)})
            unfinished.rename(file)
        with safe_open(file, framework="numpy") as opened:
            numbers = json.loads(opened.metadata()["numbers"])
            return Evaluation(list(opened.get_tensor("videos")), opened.get_tensor("features"), numbers)

    def model(self, source: Source) -> VideoModel:
        """The last one stays loaded."""
        if self.loaded is None or self.loaded[0] is not source:
            self.loaded = source, source.load(self.device)
        return self.loaded[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a comparison. `kind`: the guided teacher; undistilled, which is the teacher sampled as a student is; or student."""

    kind: str
    model: str
    steps: int
    evaluation: Evaluation

    @property
    def title(self) -> str:
        return f"{self.model}, {self.steps}"


def compare(
    evaluator: Evaluator, students: list[tuple[Source, Settings]], teacher: tuple[Source, Settings] | None, steps: list[int]
) -> list[Row]:
    """The students at each number of steps; before them the teacher at its own, guided, and what it makes in the first student's grids."""
    rows = []
    if teacher:
        source, settings = teacher
        rows.append(Row("teacher", "teacher, guided", settings.steps, evaluator(source, settings)))
        few_step = {number: students[0][1].changed(steps=number).few_step for number in steps}
        for number, grid in few_step.items():
            undistilled = settings.model_copy(update={"steps": number, "few_step": grid, "guidance": 1.0})
            rows.append(Row("undistilled", "undistilled", number, evaluator(source, undistilled)))
    for source, settings in students:
        rows += [Row("student", source.name, number, evaluator(source, settings.changed(steps=number))) for number in steps]
    return rows


def lines_of(rows: list[Row], reference_NF: np.ndarray | None) -> dict[str, dict[str, float]]:
    """The numbers of each row, by its title, with what compares it to the teacher where there is one.

    `gap_closed`: (undistilled - student) / (undistilled - teacher) in Fréchet distances, at the same number of steps.
    `both`, `speed`, `saturation` and the spreads `_of_teacher`: ratios. `diversity`: the least of those of the spreads.
    """
    lines = {row.title: dict(row.evaluation.numbers) for row in rows}
    if reference_NF is not None:
        for row in rows:
            lines[row.title]["frechet"] = moving_shapes.frechet_distance(row.evaluation.features_NF, reference_NF)
    teacher = next((lines[row.title] for row in rows if row.kind == "teacher"), None)
    if teacher is None:
        return lines
    undistilled = {row.steps: lines[row.title] for row in rows if row.kind == "undistilled"}
    for row in rows:
        line = lines[row.title]
        line |= {f"{name}_of_teacher": line[name] / teacher[name] for name in RATIOS if teacher[name] > 0}
        if min(teacher[spread] for spread in SPREADS) > 0:  # it has two videos of a caption
            line["diversity"] = min(line[f"{spread}_of_teacher"] for spread in SPREADS)
        if row.kind == "student" and "frechet" in line:
            before = undistilled[row.steps]["frechet"]
            if before != teacher["frechet"]:  # as they are at guidance 1 and the teacher's own steps
                line["gap_closed"] = (before - line["frechet"]) / (before - teacher["frechet"])
    return lines


def panels(rows: list[Row], lines: dict[str, dict[str, float]]) -> list[Panel]:
    """Curves over the number of steps, of what is there."""
    found = []
    for name in ("frechet", "both", "diversity", "speed", "saturation", "seconds"):
        curves: dict[str, dict[int, float]] = {}
        level = None
        for row in rows:
            if name not in lines[row.title]:
                continue
            if row.kind == "teacher":
                level = lines[row.title][name]
            else:
                curves.setdefault(row.model, {})[row.steps] = lines[row.title][name]
        if curves:
            found.append(Panel(name, curves, level))
    return found

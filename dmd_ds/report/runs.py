"""What a run's folder holds, read for a report; a run that has just begun, or was never looked at, holds less."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from dmd_ds.errors import UserError, parse_json, read_json, read_json_mapping, read_text
from dmd_ds.recipe import Recipe, load_recipe
from dmd_ds.start import STARTS
from dmd_ds.validation import EMA, PROMPTS_FILE, TEACHER, TEACHER_FILE, TRAINED

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """`metrics`: a line a step; `warnings`, `starts`: a line each; `kept`: the numbers of the teacher and the undistilled model."""

    folder: Path
    name: str
    recipe: Recipe
    recipe_text: str
    metrics: list[Line]
    warnings: list[Line]
    starts: list[Line]
    kept: dict[str, dict[str, float]]
    prompts: list[str]  # of the videos that are shown

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def student(self) -> str:
        """Which weights are the student's."""
        return EMA if self.recipe.generator.ema_decay else TRAINED

    def column(self, name: str) -> dict[int, float | None]:
        """A number by step, where it was logged."""
        return {line["step"]: line[name] for line in self.metrics if name in line}

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)

    @functools.cached_property
    def looks(self) -> dict[int, Path]:
        """The folders of samples by step."""
        found = (self.folder / "samples").glob("step_*[0-9]")
        return {int(path.name.removeprefix("step_")): path for path in sorted(found, key=lambda path: path.name)}

    def videos(self, name: str, step: int | None = None) -> list[Path]:
        """The files of the shown prompts in their order: of the teacher or the undistilled model, or of these weights at a step."""
        samples = self.folder / "samples"
        places = range(len(self.prompts))
        files = [samples / name / f"{i:03d}.mp4" if step is None else self.looks[step] / f"{i:03d}_{name}.mp4" for i in places]
        return files if all(file.is_file() for file in files) else []


def lines_of(file: Path) -> list[Line]:
    """Of a .jsonl file whose lines have a step, none where there is no file; a line that is being written is left out."""
    if not file.is_file():
        return []
    whole = read_text(file).rpartition("\n")[0]
    lines = [parse_json(text, file, number) for number, text in enumerate(whole.splitlines(), 1)]
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{file}:{number}: a line is a mapping with a step")
    return lines


def read_run(folder: Path) -> RunFolder:
    """`UserError` for a folder that is not a run's."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: not the folder of a run; recipe.yaml is missing")
    teacher, prompts = folder / "samples" / TEACHER / TEACHER_FILE, folder / "samples" / PROMPTS_FILE
    return RunFolder(
        folder=folder,
        name=folder.resolve().name,
        recipe=load_recipe(str(file)),
        recipe_text=read_text(file),
        metrics=lines_of(folder / "metrics.jsonl"),
        warnings=lines_of(folder / "warnings.jsonl"),
        starts=lines_of(folder / STARTS),
        kept=read_json_mapping(teacher)["numbers"] if teacher.is_file() else {},
        prompts=read_json(prompts) if prompts.is_file() else [],
    )

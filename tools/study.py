#!/usr/bin/env python3
"""Trains variants of a recipe on the embedded world, each with several seeds, and puts what they reach into one table.

    python tools/study.py ablation [--jobs 2] [--out outputs/studies/ablation]
    python tools/study.py my_study.yaml

A study is one that ships in tools/studies or a YAML file:

    recipe: tiny              # a shipped recipe or a YAML file
    seeds: [0, 1, 2]
    prompts: 256              # judged videos a run
    sizes: [17x96x96]         # frames x height x width: judged there too, beside the teacher
    common: [max_steps=600]   # of all runs
    runs:                     # by name, what is changed
      whole: []
      without EMA: [generator.ema_decay=null]

Every run is one process on one rank. A run that is finished is not trained again, one that was stopped goes on. The folder gets
table.md and study.json: means over the seeds, and how far the seeds lie apart.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from dmd_ds import checkpoint
from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.data import moving_shapes
from dmd_ds.data.video import VideoSize
from dmd_ds.errors import RunError, UserError, one_line_errors, read_text
from dmd_ds.evaluation import RATIOS, REFERENCE, Evaluator, caption_list, compare, lines_of
from dmd_ds.recipe import REPOSITORY, Recipe, load_recipe, nearest, parse_yaml, validated
from dmd_ds.section import Section, Seed, SizeText
from dmd_ds.source import find_source

STUDIES = REPOSITORY / "tools" / "studies"
COLUMNS = ("gap_closed", "frechet", "diversity", *(f"{name}_of_teacher" for name in RATIOS), "seconds_trained")


class Study(Section):
    recipe: str = "tiny"
    seeds: list[Seed] = Field([0], min_length=1)
    prompts: Annotated[int, Field(ge=2)] = 256
    first_seed: Seed = Field(1000, description="of the judged videos")
    sizes: list[SizeText] = Field([], description="frames x height x width, where students are judged beside their own")
    common: list[str] = Field([], description="key=value, changes to the recipe of all runs")
    runs: dict[str, list[str]] = Field(min_length=1)

    def recipe_of(self, name: str, seed: int, out: Path) -> Recipe:
        where = out / f"{folder_name(name)}-{seed}"
        return load_recipe(self.recipe, [*self.common, *self.runs[name], f"seed={seed}", f"output_dir={where}"])


def folder_name(name: str) -> str:
    """What a run's folder is called but for its seed: it lies in the study's."""
    return re.sub(r"[^\w.+=,-]", "_", name)[:100]


def find_study(name: str) -> Path:
    shipped = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    path = STUDIES / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise UserError(f"study {name!r} is neither a YAML file nor one that ships ({', '.join(shipped)}){nearest(name, shipped)}")
    return path


def read_study(path: Path) -> Study:
    study = validated(Study, parse_yaml(read_text(path), str(path)), str(path))
    named = {}
    for name in study.runs:
        if folder_name(name) in named:
            raise UserError(f"{path}: runs {named[folder_name(name)]!r} and {name!r} would be one folder; give one another name")
        named[folder_name(name)] = name
    return study


def is_finished(recipe: Recipe) -> bool:
    latest = checkpoint.latest(Path(recipe.output_dir))
    return latest is not None and checkpoint.read_state(latest).step >= recipe.max_steps


def train(recipe: Recipe, overrides: list[str], name: str, threads: int) -> None:
    """One run, in a process of its own; `RunError` names the log of one that fails."""
    run = Path(recipe.output_dir)
    if is_finished(recipe):
        return
    run.mkdir(parents=True, exist_ok=True)
    print(f"training {run.name}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_PORT": "0"}
    with (run / "train.log").open("a") as log:
        command = [sys.executable, "dmd_ds/train.py", name, *overrides]
        ended = subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if ended.returncode:
        raise RunError(f"{run.name} ended with code {ended.returncode}; {run / 'train.log'} says why")


def measure(study: Study, recipe: Recipe, teacher: str, evaluator: Evaluator) -> dict[str, float]:
    """What the student reaches in the steps it was trained for, beside its teacher, guided as published, and what that makes in as many.

    At each of the study's sizes `both`, and `falls at`: how much further the student falls there from its own size than the teacher.
    """
    student, source = find_source(recipe.output_dir), find_source(teacher)
    own = {name: getattr(student.settings, name) for name in VideoSize._fields}
    students = student.settings.changed(steps=recipe.sampling.steps)
    rows = compare(evaluator, [(student, students)], (source, source.settings.changed(**own)), [recipe.sampling.steps])
    lines = lines_of(rows, moving_shapes.read_features(REFERENCE))
    kinds = {row.kind: lines[row.title] for row in rows}
    found = kinds["student"]
    seconds = [json.loads(line)["seconds"] for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    numbers = {name: found[name] for name in COLUMNS if name in found} | {"seconds_trained": sum(seconds)}
    for size in study.sizes:
        there = VideoSize.parse(size)._asdict()
        both = {
            "student": evaluator(student, students.changed(**there)).numbers["both"],
            "teacher": evaluator(source, source.settings.changed(**there)).numbers["both"],
        }
        falls = {kind: kinds[kind]["both"] - both[kind] for kind in both}
        numbers |= {f"both at {size}": both["student"], f"falls at {size}": falls["student"] - falls["teacher"]}
    return numbers


def markdown(found: dict[str, list[dict[str, float]]]) -> str:
    """A row a run: the mean over its seeds, and half of what lies between the least and the most."""
    measured = {column for seeds in found.values() for numbers in seeds for column in numbers}
    columns = [*COLUMNS, *sorted(measured - set(COLUMNS))]
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name, seeds in found.items():
        cells = []
        for column in columns:
            values = [numbers[column] for numbers in seeds if column in numbers]
            apart = (max(values) - min(values)) / 2 if values else 0
            cells.append("-" if not values else f"{statistics.mean(values):.3f}" + (f" ± {apart:.3f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def study_runs(study: Study, out: Path, jobs: int) -> None:
    recipes = {(name, seed): study.recipe_of(name, seed, out) for seed in study.seeds for name in study.runs}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for (name, seed), recipe in recipes.items():
            overrides = [*study.common, *study.runs[name], f"seed={seed}", f"output_dir={recipe.output_dir}"]
            waiting.append(pool.submit(train, recipe, overrides, study.recipe, threads))
        for one in waiting:
            one.result()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator(caption_list(study.prompts), study.first_seed, out / "cache", device, batch_size=27)
    found: dict[str, list[dict[str, float]]] = {}
    for (name, _), recipe in recipes.items():
        found.setdefault(name, []).append(measure(study, recipe, recipe.model.path, evaluator))
        write_whole(out / "table.md", markdown(found))
        write_whole(out / "study.json", json.dumps({"study": study.model_dump(mode="json"), "runs": found}, indent=1) + "\n")
    print(markdown(found))


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("study", help=f"one that ships ({', '.join(sorted(p.stem for p in STUDIES.glob('*.yaml')))}) or a YAML file")
    parser.add_argument("--out", type=Path, help="default: outputs/studies/NAME")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at once (default: one a core)")
    a = parser.parse_args()
    with one_line_errors():
        if a.jobs < 1:
            raise UserError(f"--jobs {a.jobs}: must be at least 1")
        path = find_study(a.study)
        study_runs(read_study(path), (a.out or Path("outputs/studies") / path.stem).resolve(), a.jobs)


if __name__ == "__main__":
    main()

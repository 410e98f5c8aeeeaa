#!/usr/bin/env python3
"""Runs stages one after the other, each from what the one before made: guidance distillation, DMD2, rewards.

    python tools/chain.py tiny --out outputs/chain --evaluate 54
    python tools/chain.py t2v_14b_480p --out /data/chain --model Wan2.1-T2V-14B-Diffusers --launcher "deepspeed --hostfile hostfiles/8node"

A chain is one that ships in tools/chains or a YAML file, a list of stages:

    - recipe: tiny_cfg_distill      # a shipped recipe or a YAML file
      changes: [max_steps=1000]     # key=value, of this stage

--out gets a run with its report.html and a diffusers folder a stage, 1_cfg_distill/ and 1_cfg_distill_model/, 2_dmd2/ and so on; the
last folder is what was wanted. The same command goes on where it stopped. key=value on the command line are of every stage.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dmd_ds import checkpoint
from dmd_ds.commands import command_parser
from dmd_ds.errors import RunError, UserError, one_line_errors, read_text
from dmd_ds.export import find_student, to_diffusers
from dmd_ds.recipe import REPOSITORY, Recipe, load_recipe, nearest, parse_yaml, validated
from dmd_ds.section import Section

CHAINS = REPOSITORY / "tools" / "chains"


class Link(Section):
    recipe: str
    changes: list[str] = []


class Step(NamedTuple):
    """A link with its place and what it is trained from."""

    name: str
    overrides: list[str]
    recipe: Recipe
    model: Path  # where it is exported to


def find_chain(name: str) -> Path:
    shipped = sorted(path.stem for path in CHAINS.glob("*.yaml"))
    path = CHAINS / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise UserError(f"chain {name!r} is neither a YAML file nor one that ships ({', '.join(shipped)}){nearest(name, shipped)}")
    return path


def read_chain(path: Path, out: Path, model: str | None, overrides: list[str]) -> list[Step]:
    """Its steps, with every recipe checked before the first one runs."""
    links = parse_yaml(read_text(path), str(path))
    if not isinstance(links, list) or not links:
        raise UserError(f"{path}: a chain is a list of stages, each with a recipe")
    steps: list[Step] = []
    for number, given in enumerate(links, 1):
        link = validated(Link, given, f"{path}: stage {number}")
        stage = load_recipe(link.recipe, [*link.changes, *overrides]).stage
        start = str(steps[-1].model) if steps else model
        own = [f"output_dir={out / f'{number}_{stage}'}", *([f"model.path={start}"] if start else [])]
        changes = [*link.changes, *overrides, *own]
        steps.append(Step(link.recipe, changes, load_recipe(link.recipe, changes), out / f"{number}_{stage}_model"))
    return steps


def run(command: list[str], log: Path) -> None:
    """`RunError` names the log of a command that fails."""
    print("$", shlex.join(command), f"  (log: {log})", flush=True)
    with log.open("a") as file:
        ended = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise RunError(f"{shlex.join(command[:3])} ... ended with code {ended.returncode}; {log} says why")


def take(step: Step, launcher: list[str]) -> None:
    """Trains and exports, as far as that is not done."""
    folder = Path(step.recipe.output_dir)
    if step.model.exists():
        return
    latest = checkpoint.latest(folder)
    if latest is None or checkpoint.read_state(latest).step < step.recipe.max_steps:
        run([*launcher, "dmd_ds/train.py", step.name, *step.overrides], folder.with_suffix(".log"))
    to_diffusers(find_student(folder), step.model)


def report(step: Step) -> None:
    """The run's page, once."""
    folder = Path(step.recipe.output_dir)
    if not (folder / "report.html").is_file():
        run([sys.executable, "tools/report.py", str(folder)], folder.with_suffix(".log"))


def evaluate(step: Step, prompts: int, teacher: str | None) -> None:
    """Into the run's own folder; beside the teacher where it is given."""
    out = Path(step.recipe.output_dir) / "evaluation"
    if (out / "report.json").is_file():
        return
    guidance = str(step.recipe.score.guidance)
    beside = ["--teacher", teacher, "--teacher-guidance", guidance] if teacher else []
    command = [sys.executable, "tools/evaluate.py", str(step.model), "--prompts", str(prompts), "--out", str(out), *beside]
    run(command, out.parent.with_suffix(".log"))


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("chain", help=f"one that ships ({', '.join(sorted(p.stem for p in CHAINS.glob('*.yaml')))}) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipes of all stages")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the runs and what they make")
    parser.add_argument("--model", help="what the first stage starts from (default: its recipe's model.path)")
    parser.add_argument("--launcher", default=sys.executable, help="what each training is started with (default: one rank)")
    parser.add_argument("--evaluate", type=int, metavar="N", help="of moving shapes: so many videos a stage go through tools/evaluate.py")
    a = parser.parse_intermixed_args()
    with one_line_errors():
        out = a.out.resolve()  # the commands run from the project's folder
        steps = read_chain(find_chain(a.chain), out, a.model, a.overrides)
        out.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(steps):
            take(step, shlex.split(a.launcher))
            report(step)
            if a.evaluate:
                evaluate(step, a.evaluate, steps[0].recipe.model.path if number == 0 else None)
            print(f"{step.recipe.stage}: {step.model}", flush=True)


if __name__ == "__main__":
    main()

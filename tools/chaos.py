#!/usr/bin/env python3
"""Kills training runs at random and starts each again with the same command: what it reaches must be what an undisturbed run does.

    python tools/chaos.py --runs 20 [--ranks 2] [--seed 0] [--out outputs/chaos]

A run is killed with SIGKILL once: one of its ranks, all of them, or the launcher; in a step, while a checkpoint is written, or
when `latest` is about to change. Then the checkpoint that `latest` names is read through, the same command goes on to the last
step, and every number that was logged is compared with the undisturbed run's. Prints a table, writes it as chaos.json, and ends
with an exit code that is not 0 unless all of them are equal.
"""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from dmd_ds import checkpoint
from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.errors import RunError, UserError, one_line_errors
from dmd_ds.monitor import OF_THE_MACHINE
from dmd_ds.recipe import REPOSITORY

WHO = ("a rank", "all ranks", "the launcher")
WHEN = ("step", "save", "switch of latest")
STEPS, SAVE_EVERY = 8, 2
SMALL = ["data.batch_size=1", "data.sizes=[5x64x64]", "validation.every=0", "regression.steps=1", "regression.teacher_steps=2"]
RECIPE = ["tiny", *SMALL, f"max_steps={STEPS}", f"save_every={SAVE_EVERY}"]
PATIENCE_S = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Job:
    """The deepspeed command over a run's folder."""

    def __init__(self, run: Path, ranks: int, background_save: bool):
        self.run = run
        run.mkdir(parents=True, exist_ok=True)
        self.log = (run / "train.log").open("a")
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--no_local_rank"]
        recipe = [*RECIPE, f"output_dir={run}", f"background_save={str(background_save).lower()}"]
        command = [*launcher, "--master_port", str(free_port()), "dmd_ds/train.py", *recipe]
        self.launcher = psutil.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def processes(self) -> list[psutil.Process]:
        """Of its ranks, in their order."""
        found = []
        for process in self.launcher.children(recursive=True):
            try:
                if any("dmd_ds/train.py" in word for word in process.cmdline()[:4]) and "RANK" in process.environ():
                    found.append((int(process.environ()["RANK"]), process))
            except psutil.Error:
                continue
        return [process for _, process in sorted(found, key=lambda one: one[0])]

    def steps(self) -> int:
        """That it has logged."""
        file = self.run / "metrics.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    def wait_until(self, reached, pause_s: float) -> bool:
        """Whether that came before the job's end; `RunError` when neither comes."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            if self.launcher.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise RunError(f"{self.run}: stands still; {self.run / 'train.log'} says why")
            time.sleep(pause_s)
        return True

    def kill(self, who: str, rng: random.Random) -> None:
        """And waits until nothing of the job is left."""
        ranks = self.processes()
        started_by_it = self.launcher.children(recursive=True)
        for victim in {"a rank": [rng.choice(ranks)], "all ranks": ranks, "the launcher": [self.launcher]}[who]:
            victim.send_signal(signal.SIGKILL)
        self.launcher.wait(PATIENCE_S)
        if left := psutil.wait_procs(started_by_it, timeout=PATIENCE_S)[1]:
            raise RunError(f"{self.run}: {len(left)} processes outlive {who} by {PATIENCE_S} s")

    def end(self) -> int:
        return self.launcher.wait(PATIENCE_S)


def disturb(job: Job, who: str, when: str, rng: random.Random) -> None:
    """Kills it before its last step."""
    step = rng.randrange(1, STEPS - 1)
    if when == "step":
        in_time = job.wait_until(lambda: job.steps() >= step, 0.01)
        time.sleep(rng.uniform(0, 1))
    else:
        folder = job.run / "checkpoints" / f"step_{-(-step // SAVE_EVERY) * SAVE_EVERY:06d}"
        awaited = folder.with_name(f"{folder.name}.unfinished") if when == "save" else folder
        in_time = job.wait_until(awaited.exists, 0.0)
        time.sleep(rng.uniform(0, 0.02) if when == "save" else 0)
    if not in_time:
        raise RunError(f"{job.run}: ended by itself; {job.run / 'train.log'} says why")
    job.kill(who, rng)


def numbers(run: Path) -> list[dict[str, float]]:
    """What was logged, but for what the machine took to it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]


def one_run(run: Path, ranks: int, undisturbed: list[dict], number: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/{number}")
    who, when = WHO[number % len(WHO)], WHEN[number // len(WHO) % len(WHEN)]
    background = rng.random() < 0.5
    job = Job(run, ranks, background)
    disturb(job, who, when, rng)
    row = {"run": number, "killed": who, "during": when, "background_save": background, "after_step": job.steps()}
    newest = checkpoint.latest(run)
    if newest:
        checkpoint.check_files(newest, checkpoint.read_manifest(newest))
    unfinished = list((run / "checkpoints").glob(f"step_*{checkpoint.UNFINISHED}"))
    row |= {"latest": newest.name if newest else "-", "unfinished": len(unfinished)}
    ended = Job(run, ranks, background).end()
    return row | {"equal": ended == 0 and numbers(run) == undisturbed}


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows)])


def chaos(out: Path, runs: int, ranks: int, seed: int) -> bool:
    """Whether all of them came out equal."""
    shutil.rmtree(out, ignore_errors=True)
    undisturbed = Job(out / "undisturbed", ranks, background_save=False)
    if undisturbed.end() != 0:
        raise RunError(f"the undisturbed run failed; {out / 'undisturbed' / 'train.log'} says why")
    expected, rows = numbers(out / "undisturbed"), []
    for number in range(runs):
        rows.append(one_run(out / f"run_{number:03d}", ranks, expected, number, seed))
        print(rows[-1], flush=True)
        write_whole(out / "chaos.json", json.dumps(rows, indent=1) + "\n")
    equal = sum(row["equal"] for row in rows)
    print(f"\n{table(rows)}\n\n{equal} of {runs} equal to the undisturbed run")
    return equal == runs


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--runs", type=int, default=20, help="9 see every kind of kill at every moment (default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--out", type=Path, default=Path("outputs/chaos"), help="is made anew (default: outputs/chaos)")
    a = parser.parse_args()
    with one_line_errors():
        for name in ("runs", "ranks"):
            if getattr(a, name) < 1:
                raise UserError(f"--{name} {getattr(a, name)}: must be at least 1")
        sys.exit(0 if chaos(a.out.resolve(), a.runs, a.ranks, a.seed) else 1)


if __name__ == "__main__":
    main()

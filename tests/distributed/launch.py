"""Runs this project's scripts on some ranks of this machine, as a launcher would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from dmd_ds.recipe import REPOSITORY, Recipe, dump_recipe


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(ranks: int, *command: str, **environment: str) -> list[subprocess.CompletedProcess]:
    """`python *command` on so many ranks; what each returned and printed."""
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [subprocess.CompletedProcess(p.args, p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def assert_fine(results: list[subprocess.CompletedProcess]) -> None:
    assert [result.returncode for result in results] == [0] * len(results), "\n".join(result.stdout for result in results)


def train(recipe: Recipe, ranks: int) -> list[dict]:
    """Trains and returns the lines of metrics.jsonl; an AssertionError shows what the ranks printed."""
    folder = Path(recipe.output_dir).parent
    file = folder / f"{Path(recipe.output_dir).name}.yaml"
    file.write_text(dump_recipe(recipe))
    assert_fine(run_ranks(ranks, "dmd_ds/train.py", str(file)))
    return metrics(recipe)


def metrics(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]

"""What befalls a run from outside: it is asked to stop, a rank hangs, numbers are not finite."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_ds import checkpoint
from dmd_ds.data.latents import LatentsWriter
from dmd_ds.monitor import OF_THE_MACHINE
from dmd_ds.recipe import REPOSITORY, Recipe, dump_recipe
from tests.distributed.comparing import assert_same_weights, weights
from tests.distributed.launch import free_port, metrics, run_ranks, train
from tests.mini import LATENTS_SHAPE, TEXT_WIDTH, make_recipe

MANY = 100_000


def start(recipe: Recipe, ranks: int) -> list[subprocess.Popen]:
    file = Path(recipe.output_dir).with_suffix(".yaml")
    file.write_text(dump_recipe(recipe))
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "dmd_ds/train.py", str(file)],
            cwd=REPOSITORY,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def wait_for_steps(recipe: Recipe, processes: list[subprocess.Popen], steps: int) -> None:
    file, deadline = Path(recipe.output_dir) / "metrics.jsonl", time.monotonic() + 120
    while not file.is_file() or len(file.read_text().splitlines()) < steps:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, [process.communicate()[0] for process in ended]
        time.sleep(0.1)


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    return texts


# ---- asked to stop ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    make_recipe(folder)
    return folder


def test_a_signal_to_one_rank_ends_all_after_the_step_and_the_same_command_goes_on_as_if_never_stopped(world):
    endless = make_recipe(world, output_dir=str(world / "asked"), max_steps=MANY, save_every=MANY, data={"batch_size": 1})
    processes = start(endless, 2)
    wait_for_steps(endless, processes, 3)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = outputs(processes)
    stopped = len(metrics(endless))
    assert f"stopped after step {stopped}, saved: another rank was asked to; the same command goes on" in first
    assert checkpoint.latest(Path(endless.output_dir)).name == f"step_{stopped:06d}"
    train(endless.model_copy(update={"max_steps": stopped + 3}), 2)
    never = endless.model_copy(update={"max_steps": stopped + 3, "output_dir": str(world / "never")})
    train(never, 2)
    strip = [[{key: line[key] for key in line if key not in OF_THE_MACHINE} for line in metrics(recipe)] for recipe in (endless, never)]
    assert strip[0] == strip[1] and len(strip[0]) == stopped + 3
    assert_same_weights(weights(endless, stopped + 3, "generator"), weights(never, stopped + 3, "generator"), 0.0)


def test_slurms_signal_a_stop_file_and_the_time_limit_do_the_same(world):
    recipe = make_recipe(world, output_dir=str(world / "in_turn"), max_steps=MANY, save_every=MANY, background_save=True)
    run = Path(recipe.output_dir)
    ends = []
    for why in ("SIGUSR1", "the file", "max_hours=0.0001"):
        limit = 1e-4 if why.startswith("max_hours") else None
        recipe = recipe.model_copy(update={"max_hours": limit})
        processes = start(recipe, 1)
        if not limit:
            wait_for_steps(recipe, processes, (ends[-1] if ends else 0) + 2)
        if why == "SIGUSR1":
            processes[0].send_signal(signal.SIGUSR1)
        elif why == "the file":
            (run / "STOP").touch()
        (output,) = outputs(processes)
        ends.append(len(metrics(recipe)))
        assert f"stopped after step {ends[-1]}, saved: {why}" in output
        assert checkpoint.latest(run).name == f"step_{ends[-1]:06d}"
        assert not (run / "STOP").exists()
    assert ends[0] < ends[1] < ends[2]


# ---- a rank that hangs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, who, message",
    [
        ("stopped", 1, "rank 1 on .* does not answer"),
        ("stopped", 0, "rank 0 on .* does not answer"),
        ("busy", 1, "rank 1 on .* stands at 'step 1: batch'"),
    ],
)
def test_a_rank_that_hangs_ends_the_others_and_is_named(how, who, message):
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.distributed.hanging_ranks", how, str(who)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, cwd=REPOSITORY, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes) for r in (0, 1)]
    try:
        output, _ = processes[1 - who].communicate(timeout=90)
        assert processes[1 - who].returncode == 1
        lines = [line for line in output.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and "no progress for 3 s (parallel.hang_timeout)" in lines[0], output
        assert re.search(message, lines[0]), lines[0]
    finally:
        for process in processes:
            process.kill()


# ---- numbers that are not finite --------------------------------------------------------------------------------------


def poisoned(folder: Path, bad: int) -> str:
    """A dataset whose first `bad` samples of 4 have text that is not finite."""
    generator = torch.Generator().manual_seed(0)
    writer = LatentsWriter(folder, fps=8, negative_embeds_LD=torch.randn(1, TEXT_WIDTH, generator=generator), samples_a_shard=4)
    for i in range(4):
        embeds = torch.randn(3, TEXT_WIDTH, generator=generator)
        latents = torch.randn(LATENTS_SHAPE, generator=generator)
        size = {"frames": 5, "height": 32, "width": 32}
        writer.add(latents, embeds * (torch.nan if i < bad else 1), None, caption=f"sample {i}", source=f"{i}.mp4", **size)
    writer.close()
    return str(folder)


def test_an_update_that_is_not_finite_is_left_out_on_all_ranks_alike(world):
    data = {"path": poisoned(world / "one_bad", bad=1), "batch_size": 1}
    recipe = make_recipe(world, output_dir=str(world / "one_bad_run"), max_steps=8, data=data)
    train(recipe, 2)
    warnings = [json.loads(line) for line in (Path(recipe.output_dir) / "warnings.jsonl").read_text().splitlines()]
    assert 1 <= len(warnings) < 8 and all("not finite; the update was left out" in line["warning"] for line in warnings)
    left_out = {line["step"] for line in warnings}
    for line in metrics(recipe):
        assert (line["loss/fake_score"] is None) == (line["grad_norm/fake_score"] is None) == (line["step"] in left_out)
    for engine in ("generator", "fake_score"):
        assert all(weight.isfinite().all() for weight in weights(recipe, 8, engine).values())


def test_when_it_goes_on_the_run_ends_with_the_batch_that_did_it_and_its_last_checkpoint(world):
    data = {"path": poisoned(world / "all_bad", bad=4), "batch_size": 1}
    changes = {"max_steps": 8, "save_every": 1, "max_skipped_updates": 2, "gan": {"generator_weight": 0.1}}
    recipe = make_recipe(world, output_dir=str(world / "all_bad_run"), data=data, **changes)
    file = world / "all_bad_run.yaml"
    file.write_text(dump_recipe(recipe))
    results = run_ranks(2, "dmd_ds/train.py", str(file))
    assert [result.returncode for result in results] == [1, 1]
    assert "3 updates in a row were left out, more than max_skipped_updates=2; the last batch lies in" in results[0].stdout
    assert "Traceback" not in results[0].stdout
    folder = Path(recipe.output_dir) / "bad_batches" / "step_000003"
    for rank in (0, 1):
        kept, (about,) = load_file(folder / f"rank_0000{rank}.safetensors"), json.loads((folder / f"rank_0000{rank}.json").read_text())
        assert kept["0/prompt_embeds"].isnan().any() and kept["0/latents"].shape == (1, *LATENTS_SHAPE)
        assert about["places"] == [rank] and about["captions"][0].startswith("sample ")
    assert checkpoint.latest(Path(recipe.output_dir)).name == "step_000002"

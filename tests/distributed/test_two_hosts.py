"""One job on two machines over ssh and pdsh, as `deepspeed --hostfile` starts it: it trains, and it ends when one rank dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dmd_ds.recipe import REPOSITORY
from tests.distributed.launch import free_port
from tests.distributed.ssh_hosts import HOSTS, ssh_hosts

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


@pytest.fixture(scope="module")
def reachable(tmp_path_factory):
    with ssh_hosts(tmp_path_factory.mktemp("ssh")) as environment:
        yield environment


def launch(folder: Path, environment: dict, hosts: list[str], *arguments: str) -> subprocess.Popen:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    # --no_ssh_check and --master_addr: the launcher asks plain ssh for these, which knows nothing of the test's own hosts
    options = ["--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", HOSTS["machine-a"], "--master_port", str(free_port())]
    recipe = ["tiny", f"output_dir={folder / 'run'}", "data.batch_size=1", "validation.every=0", "regression.steps=0", *arguments]
    output = (folder / "output").open("w")
    command = [DEEPSPEED, *options, "dmd_ds/train.py", *recipe]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)


def ranks(folder: Path) -> dict[int, psutil.Process]:
    """The processes of the job that writes into this folder, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("dmd_ds/train.py" in word for word in words[:4]) and any(str(folder) in word for word in words):
            found[int(process.environ()["RANK"])] = process
    return found


def test_a_job_on_two_hosts_ends_within_a_minute_of_a_ranks_death_and_names_it(tmp_path, reachable):
    job = launch(tmp_path, reachable, list(HOSTS), "max_steps=100000", "save_every=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.5)
    processes = ranks(tmp_path)
    assert sorted(processes) == [0, 1]
    assert {process.environ()["CROSS_RANK"] for process in processes.values()} == {"0", "1"}  # one on each host

    os.kill(processes[1].pid, signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    output = (tmp_path / "output").read_text()
    assert "error: rank 1 on machine-b is gone" in output, output
    assert not ranks(tmp_path)


def test_a_host_that_does_not_answer_is_named_before_any_model_is_loaded(tmp_path, reachable):
    job = launch(tmp_path, reachable, ["machine-a", "machine-nowhere"], "max_steps=1", "parallel.join_timeout=15")
    assert job.wait(timeout=120) != 0
    output = (tmp_path / "output").read_text()
    assert "error: no answer within 15 s (parallel.join_timeout) from rank 1 on machine-nowhere" in output, output
    assert not (tmp_path / "run").exists()


def test_a_sample_is_not_spread_over_two_machines(tmp_path, reachable):
    job = launch(tmp_path, reachable, list(HOSTS), "max_steps=1", "parallel.ulysses=2")
    assert job.wait(timeout=120) != 0
    output = (tmp_path / "output").read_text()
    assert "ranks 0 to 1 share a sample (parallel.ulysses x parallel.ring = 2) but not a machine: machine-a has 1 ranks" in output, output
    assert not (tmp_path / "run").exists()

"""A job that cannot be laid out is refused in one line with the arithmetic in it, before any model is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmd_ds.errors import UserError
from dmd_ds.parallel.attention import CpuFlash, ring_kernel
from dmd_ds.parallel.hosts import argument, host_of_rank
from dmd_ds.parallel.mesh import check_degrees, check_one_machine_a_sample
from dmd_ds.recipe import REPOSITORY, Parallel
from tests.distributed.launch import free_port


@pytest.mark.parametrize(
    ("heads", "ulysses", "ring", "ranks", "message"),
    [
        (40, 3, 1, 6, "parallel.ulysses=3 does not divide the 40 attention heads of the model; try one of 1, 2, 4, 5, 8, 10"),
        (12, 2, 2, 6, "parallel.ulysses=2 x parallel.ring=2 = 4 does not divide the 6 ranks of this job"),
        (12, 4, 1, 1, "parallel.ulysses=4 x parallel.ring=1 = 4 does not divide the 1 ranks of this job"),
    ],
)
def test_degrees_that_do_not_divide_are_told_with_the_arithmetic(monkeypatch, heads, ulysses, ring, ranks, message):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError) as error:
        check_degrees(Parallel(ulysses=ulysses, ring=ring), heads)
    assert str(error.value) == message


def test_degrees_that_divide_pass(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    check_degrees(Parallel(ulysses=4, ring=2), heads=12)


def test_the_ranks_of_a_sample_sit_on_one_machine():
    two_machines = ["a", "a", "a", "a", "b", "b", "b", "b"]
    check_one_machine_a_sample(two_machines, 4)
    with pytest.raises(UserError, match=r"ranks 3 to 5 share a sample .* = 3\) but not a machine: .* has 4 ranks; let 3 divide"):
        check_one_machine_a_sample([*two_machines, "b"], 3)
    with pytest.raises(UserError, match="ranks 0 to 7 share a sample"):
        check_one_machine_a_sample(two_machines, 8)


def test_a_ring_needs_a_kernel_that_tells_the_log_sum_exp():
    assert ring_kernel(torch.device("cpu"), torch.float32) is CpuFlash
    with pytest.raises(UserError, match="parallel.ring: no attention kernel for cuda in torch.float32 .* use parallel.ring=1"):
        ring_kernel(torch.device("cuda"), torch.float32)


def test_the_launchers_arguments_are_read_from_its_command_line():
    class Launcher:
        def cmdline(self):
            return ["python", "deepspeed", "--world_info=abc=", "-H", "hosts", "--master_port", "1"]

    assert [argument(Launcher(), name) for name in ("world_info", "H", "master_port", "include")] == ["abc=", "hosts", "1", None]
    assert host_of_rank(3)  # under no launcher: this machine's name


def deepspeed(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "hostfile").write_text("localhost slots=2\n")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(folder / "hostfile"), "--no_ssh_check"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return subprocess.run([*launcher, *address, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("launcher", "recipe", "message"),
    [
        (["--num_gpus", "3"], [], "hostfile: localhost has 2 slots, 3 ranks were asked for there"),
        ([], ["parallel.ulysses=3"], "parallel.ulysses=3 does not divide the 4 attention heads of the model; try one of 1, 2, 4"),
        ([], ["parallel.ring=4"], "parallel.ulysses=1 x parallel.ring=4 = 4 does not divide the 2 ranks of this job"),
    ],
)
def test_a_launch_that_cannot_be_ends_in_one_line(tmp_path, launcher, recipe, message):
    done = deepspeed(tmp_path, *launcher, "dmd_ds/train.py", "tiny", f"output_dir={tmp_path / 'run'}", *recipe)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert done.returncode != 0 and len(errors) == 1 and errors[0].endswith(message), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("leaves", "code"),
    [("pass", 0), ("raise UserError('early')", 2), ("import atexit; atexit.register(os._exit, 9); raise UserError('early')", 2)],
    ids=["at the end", "by an error", "by an error, at once"],
)
def test_a_rank_ends_with_nobody_left_in_the_store(leaves, code):
    """A thread that is inside the store, or a process group, when the interpreter goes away ends the process with SIGABRT."""
    script = f"""
import os
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.parallel.hosts import RollCall
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel
RollCall.BEAT_S = 0
with one_line_errors(), joined(Parallel()):
    {leaves}
"""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr


def test_a_cuda_build_of_torch_joins_on_a_machine_without_a_gpu():
    code = "import torch; torch.version.cuda = '13.0'\n" + (
        "from dmd_ds.parallel.mesh import joined\nfrom dmd_ds.recipe import Parallel\n"
        "with joined(Parallel()) as mesh: print('joined on', mesh.device)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "joined on cpu" in done.stdout, done.stderr


def test_every_group_waits_longer_than_the_roll_call_that_is_to_speak_first():
    code = """
import torch.distributed as dist
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel
with joined(Parallel(hang_timeout=77.0)) as mesh:
    made_later = dist.new_group([0])
    groups = (dist.group.WORLD, made_later, mesh.sequence_group, mesh.ulysses_group, mesh.ring_group)
    print("seconds", *(group._get_backend(mesh.device).options._timeout.total_seconds() for group in groups))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert f"seconds{' 154.0' * 5}" in done.stdout, done.stdout + done.stderr

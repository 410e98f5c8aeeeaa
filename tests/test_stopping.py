"""What asks a run to end, and what keeps two from one folder."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from dmd_ds.errors import UserError
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.recipe import REPOSITORY
from dmd_ds.stopping import Stopping, alone_in

HOLD = """
import sys
from pathlib import Path
from tests.test_stopping import rank
from dmd_ds.stopping import alone_in
with alone_in(Path(sys.argv[1]), rank(0)):
    print("in", flush=True)
    sys.stdin.read()
"""


def rank(number: int) -> Mesh:
    return Mesh(number, 2, torch.device("cpu"), 1, 1, None, None, None, lambda doing: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_ends_nothing(tmp_path, number):
    before = signal.getsignal(number)
    with Stopping(tmp_path, None, is_first=False) as stopping:
        assert stopping.reason is None
        os.kill(os.getpid(), number)
        assert stopping.reason == number.name
    assert signal.getsignal(number) == before


def test_a_file_asks_the_first_rank_and_is_gone_when_it_was_heeded(tmp_path):
    with Stopping(tmp_path, None, is_first=True) as first, Stopping(tmp_path, None, is_first=False) as other:
        assert first.reason is None
        (tmp_path / "STOP").touch()
        assert first.reason == f"the file {tmp_path / 'STOP'}" and other.reason is None
        other.heeded()
        assert (tmp_path / "STOP").exists()
        first.heeded()
        assert first.reason is None


def test_the_time_is_up_after_so_many_hours(tmp_path):
    with Stopping(tmp_path, 1.0, is_first=False) as stopping:
        assert stopping.reason is None
        stopping.began -= 3601
        assert stopping.reason == "max_hours=1"


def test_a_folder_is_held_by_one_job_and_free_again_when_that_was_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"another job trains there, process {holder.pid} on "), alone_in(tmp_path, rank(0)):
            pass
        with alone_in(tmp_path, rank(1)):  # the first rank speaks for all
            pass
        holder.kill()
    with alone_in(tmp_path, rank(0)):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")

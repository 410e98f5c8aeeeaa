"""metrics.jsonl holds one line a step, also after a resume from an earlier step; the other ranks' output lies in files."""

import json
import subprocess
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmd_ds.errors import UserError
from dmd_ds.monitor import Monitor
from dmd_ds.progress import Progress
from dmd_ds.recipe import REPOSITORY, load_recipe
from dmd_ds.trackers import check_trackers


def monitor(run, first_step: int = 0, trackers: str = "[]", writes: bool = True) -> Monitor:
    return Monitor(run, load_recipe("tiny", ["max_steps=10", f"trackers={trackers}"]), first_step, writes)


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_takes_back_the_lines_of_the_steps_it_repeats(tmp_path):
    first = monitor(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss/dm": 1.0})
    first.close()
    second = monitor(tmp_path, first_step=2)
    second.log(3, {"loss/dm": 2.0})
    second.close()
    assert steps(tmp_path) == [1, 2, 3]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/dm"] == 2.0 and last["seconds"] >= 0 and 0.01 < last["memory_gb"] < 1000


def test_a_line_that_a_crash_left_half_written_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": 2, "sec')
    monitor(tmp_path, first_step=1).close()
    assert steps(tmp_path) == [1]


def test_other_ranks_write_nothing(tmp_path):
    other = monitor(tmp_path, writes=False)
    other.log(1, {"loss/dm": 1.0})
    other.close()
    assert list(tmp_path.iterdir()) == []


# ---- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_number(tmp_path):
    written = monitor(tmp_path, trackers="[tensorboard]")
    for step in (1, 2):
        written.log(step, {"loss/dm": 0.5 * step})
    written.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/dm", "seconds", "memory_gb"}
    assert [(event.step, event.value) for event in events.Scalars("loss/dm")] == [(1, 0.5), (2, 1.0)]


class Service(types.ModuleType):
    """Stands in for a tracker's package: keeps what it is told."""

    def __init__(self, name: str):
        super().__init__(name)
        self.told: list = []
        self.__spec__ = True

    def init(self, **settings):
        self.told.append(settings)
        return types.SimpleNamespace(log=lambda numbers, step: self.told.append((step, numbers)), finish=lambda: self.told.append("end"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_recipe_the_numbers_and_the_end(tmp_path, monkeypatch, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    written = monitor(tmp_path, trackers=f"[{name}]")
    written.log(1, {"loss/dm": 0.5})
    written.close()
    settings, (step, numbers), end = service.told
    assert settings["project"] == "dmd_ds" and settings["resume"] == "allow" and settings["config"]["max_steps"] == 10
    assert step == 1 and numbers["loss/dm"] == 0.5 and end == "end"


def test_a_service_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers=\['tensorboard', 'wandb'\]: wandb is not installed; pip install wandb"):
        check_trackers(load_recipe("tiny", ["trackers=[tensorboard,wandb]"]))
    check_trackers(load_recipe("tiny"))


# ---- what is shown ----------------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_now_and_then_with_all_that_matters(capsys, monkeypatch):
    progress = Progress(0, 200)
    now = progress.began
    monkeypatch.setattr("time.monotonic", lambda: now)
    for step in range(1, 201):
        now += 0.5
        progress.advance(step, {"loss/dm": 0.25, "grad_norm/generator": 2.0, "drift": 9.0, "seconds": 0.5, "memory_gb": 1.5})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and len(lines) == 10
    assert lines[0] == "step 20/200, 01:30 left, 0.5 s a step, dm 0.25, |g| generator 2, 1.5 GB"
    assert lines[-1].startswith("step 200/200, 00:00 left")


def test_in_a_terminal_it_is_one_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(0, 2)
    for step in (1, 2):
        progress.advance(step, {"loss/dm": 0.25, "seconds": 0.5, "memory_gb": 1.5})
    progress.say("warning: look")
    progress.close()
    err = capsys.readouterr().err
    assert "2/2" in err and "0.5 s a step, dm 0.25, 1.5 GB" in err and "warning: look\n" in err


PRINTING = """
import subprocess, sys, warnings
from pathlib import Path
from dmd_ds.monitor import log_of_other_ranks
for rank in (0, 3):
    with log_of_other_ranks(Path(sys.argv[1]), rank):
        print(f"rank {rank}")
        subprocess.run(["echo", f"below {rank}"])
        warnings.warn(f"careful {rank}")
        print("an error", file=sys.stderr)
    print("after")
"""


def test_what_other_ranks_print_goes_to_a_file_and_their_errors_do_not(tmp_path):
    done = subprocess.run([sys.executable, "-u", "-c", PRINTING, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["rank 0", "below 0", "after", "after"]
    assert done.stderr.count("an error") == 2 and "careful 0" in done.stderr and "careful 3" not in done.stderr
    log = (tmp_path / "logs" / "rank_00003.log").read_text()
    assert "rank 3" in log and "below 3" in log and "careful 3" in log
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]

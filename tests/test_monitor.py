"""metrics.jsonl holds one line a step, also after a resume from an earlier step."""

import json

from dmd_ds.monitor import Monitor


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_takes_back_the_lines_of_the_steps_it_repeats(tmp_path):
    first = Monitor(tmp_path, 0, 10, writes=True)
    for step in (1, 2, 3):
        first.log(step, {"loss/dm": 1.0})
    first.close()
    second = Monitor(tmp_path, 2, 10, writes=True)
    second.log(3, {"loss/dm": 2.0})
    second.close()
    assert steps(tmp_path) == [1, 2, 3]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/dm"] == 2.0 and last["seconds"] >= 0


def test_a_line_that_a_crash_left_half_written_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": 2, "sec')
    Monitor(tmp_path, 1, 10, writes=True).close()
    assert steps(tmp_path) == [1]


def test_other_ranks_write_nothing(tmp_path):
    monitor = Monitor(tmp_path, 0, 10, writes=False)
    monitor.log(1, {"loss/dm": 1.0})
    monitor.close()
    assert list(tmp_path.iterdir()) == []

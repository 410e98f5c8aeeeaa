"""Runs that are killed and started again: a few of those of tools/chaos.py, and that its comparison sees a difference."""

import json

import pytest

from tools import chaos


@pytest.mark.slow
def test_runs_that_were_killed_reach_what_an_undisturbed_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "WHO", ("the launcher", "a rank"))
    monkeypatch.setattr(chaos, "WHEN", ("switch of latest", "step"))
    assert chaos.chaos(tmp_path, runs=3, ranks=2, seed=1)
    rows = json.loads((tmp_path / "chaos.json").read_text())
    assert [row["killed"] for row in rows] == ["the launcher", "a rank", "the launcher"]
    assert [row["during"] for row in rows] == ["switch of latest", "switch of latest", "step"]
    assert all(row["equal"] and row["after_step"] < chaos.STEPS for row in rows)


def test_what_took_longer_is_equal_and_another_loss_is_not(tmp_path):
    for name, line in {
        "a": {"step": 1, "loss/dm": 0.5, "seconds": 1.0},
        "b": {"step": 1, "loss/dm": 0.5, "seconds": 2.0},
        "c": {"step": 1, "loss/dm": 0.25, "seconds": 1.0},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    a, b, c = (chaos.numbers(tmp_path / name) for name in "abc")
    assert a == b != c

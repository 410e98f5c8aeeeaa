"""What a report reads from a run's folder, and what it makes of it."""

import json
import math

import pytest

from dmd_ds.errors import UserError
from dmd_ds.report.page import content, differences, write_page
from dmd_ds.report.panels import groups, thinned
from dmd_ds.report.runs import read_run
from dmd_ds.report.samples import Videos, evenly, gather
from tests.report.made import PROMPTS, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def other(folder):
    return make_run(folder.parent / "other", looks=(4,), prompts=PROMPTS[:1], seed=3)


def panels_of(*runs) -> dict[str, dict]:
    return {panel.title: panel for group in groups([read_run(run) for run in runs]) for panel in group.panels}


def test_curves_are_the_numbers_of_the_log_with_gaps_where_they_are_not_finite(folder):
    panel = panels_of(folder)["Distribution matching, loss"]
    assert panel.series[0].x == [1, 2, 3, 4, 5, 6]
    assert panel.series[0].y == [1, 0.5, None, 0.25, 0.2, 0.16667]


def test_drift_stands_in_its_band_and_beside_the_undistilled_models(folder):
    panels = panels_of(folder)
    assert panels["Drift: the largest deviation"].band == (0.0, 0.25) and panels["Motion"].band == (-0.25, 0.25)
    assert panels["Drift: the largest deviation"].levels == {"undistilled": 0.5}
    assert [series.name for series in panels["Motion"].series] == ["average", "trained weights"]


def test_several_runs_are_curves_of_one_panel(folder, other):
    panels = panels_of(folder, other)
    assert [series.name for series in panels["Motion"].series] == ["run", "other"]
    assert [series.x for series in panels["Motion"].series] == [[2, 4, 6], [4]]
    (row,) = [row for row in differences([read_run(folder), read_run(other)]) if row[0] == "seed"]
    assert row == ["seed", "0", "3"]


def test_a_long_curve_keeps_its_spikes():
    column = {step: math.sin(step) for step in range(100_000)} | {70_001: 50.0, 70_002: None}
    x, y = thinned(column, most=500)
    assert len(x) <= 500 and x == sorted(x) and 50.0 in y and min(y) < -0.99


def test_the_videos_are_those_of_each_prompt_step_and_column_each_once(folder):
    videos = Videos()
    samples = gather([read_run(folder)], 10**7, videos)
    assert samples.prompts == PROMPTS and samples.steps == [2, 4, 6] and not samples.left_out
    numbers = [number for look in samples.looks[0].values() for row in look.values() for number in row]
    assert len(set(numbers)) == 3 * 2 * 2 and set(samples.fixed) == {"teacher", "undistilled"}
    assert len(videos.content) == 3 * 2 * 2 + 2 * 2


def test_what_the_page_has_no_room_for_is_left_out_and_said(folder):
    run = read_run(folder)
    whole = sum(file.stat().st_size for file in folder.rglob("*.mp4"))
    fewer = gather([run], int(0.8 * whole), Videos())
    assert fewer.steps == [2, 6] and fewer.prompts == PROMPTS and "Shown are 2 of 3 looks and 2 of 2 prompts" in fewer.left_out
    one_row = gather([run], int(0.26 * whole), Videos())
    assert one_row.prompts == PROMPTS[:1] and one_row.steps == [6]
    assert gather([run], 100, Videos()) is None
    assert evenly([1, 2, 3, 4, 5], 3) == [1, 3, 5] and evenly([1, 2], 1) == [2]


def test_a_prompt_that_another_run_has_not_is_left_blank_there(folder, other):
    samples = gather([read_run(folder), read_run(other)], 10**7, Videos())
    assert [number is None for number in samples.looks[1][4]["ema"]] == [False, True]
    assert list(samples.looks[0][2]) == ["ema"]  # of several runs each one's student


def test_the_memory_that_was_planned_stands_beside_what_was_measured(folder):
    memory = content([read_run(folder)], 10)["runs"][0]["memory"]
    assert memory["always"] == {"weights": 1.0} and memory["peak"] == {"video": 0.2} and memory["measured"] == 2.0 - 0.5


def test_a_run_that_has_just_begun_makes_a_page_too(folder, tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    (run / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    write_page([run], run / "report.html")
    assert "<title>young</title>" in (run / "report.html").read_text()


def test_what_is_no_run_and_what_is_named_twice_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="not the folder of a run; recipe.yaml is missing"):
        write_page([tmp_path], tmp_path / "x.html")
    with pytest.raises(UserError, match="name each run once"):
        write_page([folder, folder / "."], tmp_path / "x.html")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps([1]) + "\n")
    with pytest.raises(UserError, match="metrics.jsonl:1: a line is a mapping with a step"):
        write_page([tmp_path / "run"], tmp_path / "x.html")

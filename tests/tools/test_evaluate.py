"""The comparison of students with their teacher: from folders and from checkpoints, nothing made twice, one line for a mistake."""

import dataclasses
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dmd_ds.errors import UserError
from dmd_ds.evaluation import Evaluation, Row, lines_of, panels
from dmd_ds.export import find_student, to_diffusers
from dmd_ds.generation import VideoModel
from dmd_ds.source import find_source
from tests.distributed.launch import assert_fine, run_ranks
from tools import evaluate

CPU = torch.device("cpu")


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        code = 0
        try:
            evaluate.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    save_file({"features": np.random.default_rng(0).normal(size=(80, 63))}, file)
    return file


@pytest.mark.parametrize("weights", ["ema", "trained"])
def test_a_checkpoint_is_sampled_as_its_export_is(run, tmp_path, weights):
    to_diffusers(find_student(run, weights=weights), tmp_path / "student")
    exported, source = VideoModel(str(tmp_path / "student"), CPU), find_source(str(run), weights)
    assert source.settings == exported.settings
    here = source.load(CPU).latents(["a red circle"], [3], source.settings)
    assert torch.equal(here, exported.latents(["a red circle"], [3], exported.settings))


def test_checkpoints_are_found_by_run_folder_or_pointer_and_told_apart(run, mini_model):
    newest = run / "checkpoints" / "step_000002"
    marks = {find_source(str(path)).mark for path in (run, newest, run / "checkpoints" / "latest", run / "checkpoints" / "best")}
    assert len(marks) == 1
    assert find_source(str(run), "trained").mark not in marks and find_source(str(mini_model)).mark not in marks
    with pytest.raises(UserError, match="--weights ema: .* is no checkpoint"):
        find_source(str(mini_model), "ema")


def test_a_table_a_report_and_pictures_and_nothing_is_made_twice(command, run, mini_model, reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    size = ("--frames", 17, "--height", 64, "--width", 64)
    arguments = (run, "--teacher", mini_model, "--steps", 1, 2, "--prompts", 3, "--reference", reference, *size, "--out", out)
    code, text, error = command(*arguments)
    assert code == 0, error
    rows = json.loads((out / "report.json").read_text())["rows"]
    kinds = [(row["kind"], row["steps"], row["evaluations"]) for row in rows]
    assert kinds == [("teacher", 50, 100), ("undistilled", 1, 1), ("undistilled", 2, 2), ("student", 1, 1), ("student", 2, 2)]
    assert all("frechet" in row and row["seconds"] > 0 for row in rows) and "gap_closed" in rows[-1]
    assert len(text.splitlines()) >= 6 and (out / "table.txt").read_text().splitlines()[1].startswith("teacher, guided, 50")
    assert iio.imread(out / "curves.png").std() > 0 and iio.imread(out / "contact_sheet.png").shape[1] > 5 * 5 * 64

    made = (out / "report.json").read_text()
    monkeypatch.setattr(VideoModel, "videos", None)  # a second run samples nothing
    assert command(*arguments)[0] == 0 and (out / "report.json").read_text() == made


def test_at_another_size_the_reference_is_the_teachers_own_or_there_is_none(command, run, mini_model, tmp_path):
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    arguments = (run, "--prompts", 2, "--frames", 5, "--height", 32, "--width", 48)
    bright = "tests.rewards.test_rewards:brightness"
    assert command(*arguments, "--out", alone, "--held-back", "--rewards", bright)[0] == 0
    report = json.loads((alone / "report.json").read_text())
    assert 0 < report["rows"][0][bright] < 1 and (alone / "table.txt").read_text().splitlines()[0].endswith("  brightness")
    assert report["reference"] is None and "frechet" not in report["rows"][0] and report["width"] == 48
    assert command(*arguments, "--out", beside, "--teacher", mini_model)[0] == 0
    report = json.loads((beside / "report.json").read_text())
    assert report["reference"] == "the teacher's videos of other seeds" and report["rows"][0]["frechet"] > 0


def row(kind: str, model: str, steps: int, mean: float, spread: float, **numbers: float) -> Row:
    rng = np.random.default_rng(steps)
    features = rng.normal(size=(400, 4))
    features = (features - features.mean(0)) / features.std(0) + [mean, 0, 0, 0]
    line = {"both": 1.0, "speed": 0.04, "saturation": 0.8, "size_spread": spread, "path_spread": 0.1, "start_spread": 0.3, "seconds": 1.0}
    return Row(kind, model, steps, Evaluation([], features, line | numbers))


def test_gap_closed_and_diversity_are_relative_to_the_teacher_at_the_same_steps():
    teacher = row("teacher", "teacher", 50, 0.0, 0.04)
    undistilled = [row("undistilled", "undistilled", 1, 4.0, 0.04), row("undistilled", "undistilled", 2, 2.0, 0.04)]
    students = [row("student", "s", 1, 2.0, 0.02, speed=0.03), row("student", "s", 2, 1.0, 0.05)]
    lines = lines_of([teacher, *undistilled, *students], teacher.evaluation.features_NF)
    assert lines["s, 1"]["gap_closed"] == pytest.approx((16 - 4) / 16, abs=0.05)
    assert lines["s, 2"]["gap_closed"] == pytest.approx((4 - 1) / 4, abs=0.05)
    assert lines["s, 1"]["diversity"] == pytest.approx(0.5) and lines["s, 2"]["diversity"] == pytest.approx(1.0)
    assert lines["s, 1"]["speed_of_teacher"] == pytest.approx(0.75)
    assert lines["s, 1"]["size_spread_of_teacher"] == pytest.approx(0.5)
    curves = {panel.title: panel for panel in panels([teacher, *undistilled, *students], lines)}
    assert curves["diversity"].curves["s"] == {1: lines["s, 1"]["diversity"], 2: lines["s, 2"]["diversity"]}
    assert curves["frechet"].level == lines["teacher, 50"]["frechet"] == pytest.approx(0, abs=1e-6)
    unguided = lines_of(
        [teacher, dataclasses.replace(teacher, kind="undistilled", model="u"), dataclasses.replace(teacher, kind="student", model="s")],
        teacher.evaluation.features_NF,
    )
    assert unguided["s, 50"]["frechet"] == lines["teacher, 50"]["frechet"] and "gap_closed" not in unguided["s, 50"]  # there is no gap


def test_two_ranks_make_videos_for_vbench_and_other_settings_are_refused(command, run, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue square\n")
    arguments = (run, "--vbench", prompts, "--samples", 2, "--out", out)
    results = run_ranks(2, "tools/evaluate.py", *map(str, arguments))
    assert_fine(results)
    assert "4 videos made, 0 were there" in results[0].stdout
    names = {path.name for path in (out / "videos").iterdir()}
    assert names == {f"{prompt}-{i}.mp4" for prompt in ("a red circle", "a blue square") for i in range(2)}
    code, _, error = command(*arguments, "--seed", 5)
    assert code == 2 and "holds videos made with other settings" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny-wan", "--prompts", "1"], "a Fréchet distance takes at least 2"),
        (["tiny-wan", "--steps", "2", "2"], "each once"),
        (["tiny-wan", "tiny-wan"], "name each student once"),
        (["nowhere"], "no such folder"),
        (["tiny-wan", "--guidance", "3"], "--guidance 3.0: tiny-wan has no guidance embedding, it cannot be told"),
        (["tiny-wan", "--rewards", "nowhere:x"], "nowhere:x: cannot be imported"),
        (["tiny-wan", "--vbench", "p.txt", "--teacher", "tiny-wan"], "without --teacher"),
        (["tiny-wan", "--reference", "nowhere"], "no such file"),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path, arguments, says):
    code, _, error = command(*arguments, "--out", tmp_path / "out")
    assert code == 2 and says in error and error.count("\n") == 1

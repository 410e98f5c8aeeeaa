"""`make demo` in small: the whole way from mp4 files to a judged student."""

import json
import subprocess
import sys

import imageio.v3 as iio
import pytest
from diffusers import WanPipeline

from dmd_ds.evaluation import COLUMNS
from dmd_ds.recipe import REPOSITORY


@pytest.mark.slow
def test_the_demo_runs_from_mp4_files_to_a_judged_student_and_again_fast(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "tools/demo.py", "--out", str(out), "--prompts", "18", "--clips", "1"]
    overrides = ["max_steps=6", "save_every=6", "validation.every=6", "data.batch_size=4", "regression.steps=1"]
    done = subprocess.run([*command, *overrides], cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    for row in ("teacher", "undistilled", "student"):
        assert set(COLUMNS) <= report[row].keys()
    assert [report[row]["evaluations"] for row in ("teacher", "undistilled", "undistilled_guided", "student")] == [100, 4, 8, 4]
    assert report["teacher"]["both"] > 0.8 and report["teacher"]["frechet"] < report["undistilled"]["frechet"]
    assert {"floor", "gap_closed", "both_of_teacher"} <= report.keys()
    assert len(list((out / "samples").glob("*.mp4"))) == 24
    assert iio.imread(out / "samples" / "contact_sheet.png").shape[1] > 3 * 5 * 64
    assert (out / "demo.webp").stat().st_size < 1_000_000
    WanPipeline.from_pretrained(out / "student")
    assert done.stdout.splitlines()[-1].strip() == str(out / "report.html")
    assert "<title>demo</title>" in (out / "report.html").read_text()

    trained_at = (out / "run" / "metrics.jsonl").stat().st_mtime_ns
    again = subprocess.run([*command, *overrides], cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (out / "run" / "metrics.jsonl").stat().st_mtime_ns == trained_at

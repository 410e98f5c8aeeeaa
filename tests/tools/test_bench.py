"""The bench counts what the closed forms say."""

import json
import subprocess
import sys

import pytest

from dmd_ds.planner.sizes import ModelSize
from dmd_ds.recipe import REPOSITORY
from tools.bench import HEAD_DIM, HEADS, Closed, load_table, run_layout, run_ranks, table, write_random_model


@pytest.mark.slow
def test_a_shared_sample_costs_what_the_closed_form_says():
    alone, shared = run_layout(1, 1, 64), run_layout(2, 2, 64)
    closed = Closed(64, HEADS * HEAD_DIM, ulysses=2, ring=2)
    assert closed.forward == 4 * (4 * 64 * 256 / 4 + 2 * 64 * 256 / 2 / 2)
    assert shared["forward"] == pytest.approx(closed.forward, rel=0.05)
    assert shared["backward"] == pytest.approx(closed.backward, rel=0.05)
    assert alone["forward"] == alone["backward"] == 0
    assert shared["kept"] / alone["kept"] < 0.4  # a quarter, and the text, which is not shared: 8 tokens beside 64
    row = {"ulysses": 2, "ring": 2, **shared, "kept_ratio": 1.0, "forward_ratio": 1.0, "backward_ratio": None}
    assert json.loads(json.dumps(row)) == row and len(table([row]).splitlines()) == 2


def test_tokens_that_would_be_padded_are_refused():
    done = subprocess.run([sys.executable, "tools/bench.py", "sp", "--tokens", "66"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "error: --tokens 66: must divide by 4" in done.stderr


def test_loading_holds_a_part_and_little_more(tmp_path):
    size = ModelSize(layers=4, heads=8, head_dim=128, ffn=4096)
    write_random_model(tmp_path, size)
    rows = run_ranks(2, "load", "--folder", str(tmp_path))
    weights = 4 * sum(size.weights())
    assert sum(row["part"] for row in rows) == pytest.approx(weights, rel=1e-3)
    for row in rows:
        assert row["largest"] == 4 * 6 * 1024**2  # of the time projection
        assert row["part"] < row["grown"] < row["part"] + weights / 2  # less than the whole model, however small
    assert len(load_table(rows).splitlines()) == 3

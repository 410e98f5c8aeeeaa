"""The planner's memory is what real trainer steps hold, tensor by tensor, over models, videos, ranks and splits."""

import json

import pytest

from tests.distributed.launch import assert_fine, run_ranks

WITHIN = 0.10

# (ranks, cases): every job of ranks measures its cases one after the other
QUICK = [
    (1, [{"width": 24, "layers": 2, "frames": 8, "batch": 2}, {"width": 48, "layers": 3, "frames": 20, "checkpointing": False}]),
    (2, [{"width": 48, "layers": 3, "frames": 20, "ulysses": 2, "steps": 2}]),
]
LORA = [{"width": w, "layers": n, "frames": t, "generator_lora_rank": r} for w, n, t, r in ((24, 2, 20, 3), (96, 4, 6, 8), (48, 2, 24, 8))]
GAN = {"generator_weight": 0.1, "width": 32}
JUDGED = [
    {"width": 48, "layers": 3, "frames": 20, "gan": GAN},
    {"width": 48, "layers": 4, "frames": 12, "batch": 2, "gan": GAN | {"r1_weight": 1.0}},
    {"width": 48, "layers": 2, "frames": 20, "gan": GAN | {"head": "convolution", "blocks": [1]}},
]
GRID = [
    (1, JUDGED),
    (2, [{**case, "ulysses": 2, "steps": 2} for case in JUDGED]),
    (1, [{"width": w, "layers": n, "frames": t} for w in (24, 48, 96) for n, t in ((2, 20), (4, 6))]),
    (1, LORA),
    (2, LORA),
    (2, [{"width": w, "layers": n, "frames": t} for w, n, t in ((24, 4, 12), (48, 2, 24), (96, 3, 4))]),
    (2, [{"width": 96, "layers": 4, "frames": 4, "prefetch": 20_000, "max_live": n} for n in (200_000, 10**9)]),
    (
        2,
        [
            {"width": 48, "layers": 2, "frames": 30, "ring": 2, "steps": 2},
            {"width": 48, "layers": 2, "frames": 12, "ring": 2, "batch": 2, "steps": 2},
        ],
    ),
    (4, [{"width": 48, "layers": 2, "frames": 30, "ulysses": 2, "ring": 2, "steps": 2}]),
]


def assert_planned_as_measured(folder, ranks: int, cases: list[dict]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    assert_fine(run_ranks(ranks, "-m", "tests.distributed.planner_ranks", str(folder)))
    found = json.loads((folder / "measured.json").read_text())
    assert len(found) == len(cases)
    for one in found:
        measured, planned = one["measured"], one["planned"]
        assert planned["standing"] == pytest.approx(measured["standing"], rel=0.02), one
        for step in ("generator", "fake score"):
            assert planned[step] == pytest.approx(measured[step], rel=WITHIN), (step, one)
            if not one["case"].get("prefetch"):  # how far prefetch runs ahead is a bound, the rest is an account
                on_top, added = planned[step] - planned["standing"], measured[step] - measured["standing"]
                assert on_top == pytest.approx(added, rel=WITHIN), (step, one)


@pytest.mark.parametrize(("ranks", "cases"), QUICK)
def test_the_peaks_of_real_steps_are_planned_within_ten_percent(tmp_path, ranks, cases):
    assert_planned_as_measured(tmp_path, ranks, cases)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), GRID)
def test_a_grid_of_sizes_and_splits_is_planned_within_ten_percent(tmp_path, ranks, cases):
    assert_planned_as_measured(tmp_path, ranks, cases)

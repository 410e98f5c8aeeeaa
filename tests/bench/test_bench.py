"""The bench counts what is sent, kept and held, and its tables say it."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dmd_ds.bench import data, gather, infer, load, memory, recipe, scale, sequence, step, utilisation
from dmd_ds.bench.counting import Collectives, counting_kept_bytes
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, written
from dmd_ds.errors import RunError, UserError
from dmd_ds.planner.sizes import PUBLISHED, ModelSize, Video
from dmd_ds.recipe import REPOSITORY

SMALL = World(layers=2, heads=2, head_dim=32, height=4, width=4, frames=2)


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/bench.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True)


# ---- counting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lone_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_counted_in_their_phase_in_forward_and_backward(lone_rank):
    def gather_all(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_gather_into_tensor(torch.empty_like(tensor), tensor)
        return tensor

    counts, leaf = Collectives(least=0), torch.ones(100, requires_grad=True)
    with counts:
        counts.during("a", lambda: counts.during("b", gather_all)(torch.ones(10)))()
        leaf.register_hook(gather_all)
        counts.during("backward", leaf.sum().backward)()
        dist.all_reduce(torch.ones(7))
    assert counts.gathered == {"b": 40, "backward": 400}
    assert counts.reduced == {"": 28}


def test_numbers_of_the_log_are_not_counted(lone_rank):
    with Collectives() as counts:
        dist.all_reduce(torch.ones(10))
    assert not counts.reduced


def test_what_a_forward_keeps_is_counted_once_and_without_its_weights():
    layer, x = torch.nn.Linear(8, 8), torch.ones(4, 8)
    with counting_kept_bytes(layer) as kept:
        layer(x).mul(x).sum()
    assert sum(storage.nbytes() for storage in kept.values()) == 4 * 8 * 4  # x, for the layer and for the product


# ---- what is gathered, held, kept -------------------------------------------------------------------------------------


def gathered_by(how: str) -> dict:
    with written(SMALL) as folder:
        return run_ranks("gather", 2, world=SMALL.__dict__, folder=folder, gather=how, iterations=2)


def test_a_rollout_gathers_its_generator_once():
    found = gathered_by("rollout")
    gathered, reduced = sum(found["gathered"].values()), sum(found["reduced"].values())
    assert gathered == pytest.approx(found["least"]["gathered"], rel=0.05)
    assert reduced == pytest.approx(found["least"]["reduced"], rel=0.05)
    assert found["gathered"]["generator: rollout"] == pytest.approx(2 * 6 * found["generator"], rel=0.01)  # a rollout an update
    assert len(gather.table({"rollout": found}).splitlines()) == 3


def test_weights_that_are_held_since_the_forward_are_not_gathered_for_the_backward():
    found = gathered_by("update")
    assert "generator: backward" not in found["gathered"]
    assert sum(found["gathered"].values()) < found["naive"]["gathered"] / 2


@pytest.mark.slow
def test_a_shared_sample_costs_what_the_closed_form_says():
    alone, shared = sequence.measure_layout(1, 1, 64), sequence.measure_layout(2, 2, 64)
    closed = sequence.Closed(64, sequence.HEADS * sequence.HEAD_DIM, ulysses=2, ring=2)
    assert closed.forward == 4 * (4 * 64 * 256 / 4 + 2 * 64 * 256 / 2 / 2)
    assert shared["forward"] == pytest.approx(closed.forward, rel=0.05)
    assert shared["backward"] == pytest.approx(closed.backward, rel=0.05)
    assert alone["forward"] == alone["backward"] == 0
    assert shared["kept"] / alone["kept"] < 0.4  # a quarter, and the text, which is not shared: 8 tokens beside 64
    row = {"ulysses": 2, "ring": 2, **shared, "kept_ratio": 1.0, "forward_ratio": 1.0, "backward_ratio": None}
    assert json.loads(json.dumps(row)) == row and len(sequence.table([row]).splitlines()) == 3


@pytest.mark.slow
def test_loading_holds_a_part_and_little_more():
    size = ModelSize(layers=4, heads=8, head_dim=128, ffn=4096)
    rows = load.measure_size(size, ranks=2)
    weights = 4 * sum(size.weights())
    assert sum(row["part"] for row in rows) == pytest.approx(weights, rel=1e-3)
    for row in rows:
        assert row["largest"] == 4 * 6 * 1024**2  # of the time projection
        assert row["part"] < row["grown"] < row["part"] + weights / 2  # less than the whole model, however small
    assert len(load.table(rows).splitlines()) == 4


@pytest.mark.slow
def test_a_rank_holds_what_zero_3_says():
    with written(memory.BASE) as folder:
        found = run_ranks("memory", 2, world=memory.BASE.__dict__, folder=folder, ulysses=1, checkpointing=True)
    assert found["standing"] == pytest.approx(found["theory"], rel=0.03)
    assert len(memory.table([{"case": "2 ranks", "rank_tokens": memory.BASE.tokens, **found}]).splitlines()) == 3


# ---- time: that it is measured, not how long it takes --------------------------------------------------------------------


@pytest.mark.slow
def test_the_trainer_and_its_floor_take_turns():
    found = step.measure(SMALL, repeats=3)
    assert {name: len(values) for name, values in found.items()} == {"trainer": 3, "floor": 3}
    assert min(found["trainer"] + found["floor"]) > 0
    assert "trainer / floor" in step.table(found)


@pytest.mark.slow
def test_an_iteration_has_its_operations_and_beside_no_accelerator_nothing_is_hidden():
    with written(SMALL) as folder:
        found = run_ranks("utilisation", 1, world=SMALL.__dict__, folder=folder)
    assert found["seconds"] > 0 and found["hidden"] is None
    forward = SMALL.model.forward_flops(SMALL.tokens, SMALL.text)
    assert found["flops"] == pytest.approx(forward * (3 + 5 * 4 + 3 + 3 + 5 * 2))  # rollouts, generator, scores, fake score


def test_communication_is_hidden_where_something_is_computed_meanwhile():
    kernels = [("ncclDevKernel_AllGather", 0, 10), ("gemm", 4, 6), ("gelu", 5, 8), ("ncclDevKernel_ReduceScatter", 20, 30)]
    assert utilisation.hidden_share(kernels) == pytest.approx(4 / 20)
    assert utilisation.hidden_share(kernels[1:3]) is None
    lines = utilisation.lines({"seconds": 2.0, "flops": 1e12, "hidden": 0.25}, peak=1e12)
    assert ["50.0%" in lines[0], "25.0%" in lines[1]] == [True, True]


@pytest.mark.slow
def test_a_shipped_recipe_takes_both_turns_with_a_plan_beside():
    with written(SMALL) as folder:
        arguments = {"name": "t2v_1.3b_480p", "overrides": ["fake_score.lora_rank=4"], "world": SMALL.__dict__, "folder": folder}
        found = run_ranks("recipe", 1, video=Video(5, 32, 32).__dict__, **arguments)
    turns = found["turns"]
    assert set(turns) == set(found["planned"]) == {"generator", "fake score"}
    assert min(*(turn["seconds"] for turn in turns.values()), *found["planned"].values(), found["standing"], found["planned_standing"]) > 0
    assert found["seconds"] == pytest.approx(turns["generator"]["seconds"] + 5 * turns["fake score"]["seconds"])
    # rollouts, generator, scores, fake score and the GAN's two, the gradient of the GAN
    assert found["flops"] == pytest.approx(SMALL.model.forward_flops(SMALL.tokens, 32) * (3 + 5 * 4 + 3 + 3 + 5 * 3 * 2 + 2))


def test_the_table_of_a_recipe_compares_with_the_plan():
    turns = {"generator": {"seconds": 5.0, "peak": 45e9, "reserved": 50e9}, "fake score": {"seconds": 1.0, "peak": 60e9, "reserved": 70e9}}
    planned = {"planned": {"generator": 50e9, "fake score": 60e9}, "planned_standing": 20e9}
    lines = recipe.table({"turns": turns, **planned, "standing": 20e9, "seconds": 10.0, "flops": 9.89e14}).splitlines()
    assert lines[2:5] == [
        "| generator | 5.00 | 45.00 | 50.00 | 0.900 | 50.00 |", "| fake score | 1.00 | 60.00 | 60.00 | 1.000 | 70.00 |",
        "| between steps | | 20.00 | 20.00 | 1.000 | |",
    ]  # fmt: skip
    assert "10.0 s, 1.0 PFLOP of the algorithm, 10.0% of 989 TFLOP/s" in lines[-1]


def test_a_recipe_is_measured_at_its_published_size_and_none_without_an_accelerator():
    world = recipe.world_of("t2v_1.3b_480p", Video(81, 480, 832))
    assert world.model == PUBLISHED["1.3b"] and world.latents_shape == (16, 21, 60, 104)
    for name in ("tiny", "i2v_14b_480p"):
        with pytest.raises(UserError, match=f"recipe {name}: must be one of text to video"):
            recipe.world_of(name, Video())
    with pytest.raises(UserError, match="rollout: stage=reward has no use for this section"):
        recipe.check_recipe("t2v_1.3b_480p_reward", [])
    with pytest.raises(UserError, match="regression.steps=5: DMD2 is measured, without a warm-up"):
        recipe.check_recipe("t2v_1.3b_480p", ["regression.steps=5"])
    with pytest.raises(UserError, match="unknown key generator.rl"):
        recipe.check_recipe("t2v_1.3b_480p", ["generator.rl=1"])
    refused = bench("gather", "t2v_1.3b_480p")
    assert refused.returncode == 2 and refused.stderr.strip() == "error: t2v_1.3b_480p: gather takes no recipe"
    done = bench("recipe", "t2v_1.3b_480p")
    assert done.returncode == 2 and done.stderr.startswith("error: recipe: needs an accelerator")


@pytest.mark.slow
def test_student_and_teacher_take_turns():
    with written(SMALL) as folder:
        how = {"folder": folder, "repeats": 2, "batch": 1, "compiled": False, "teacher": True, "ulysses": 1}
        found = run_ranks("infer", 1, what="denoising", world=SMALL.__dict__, **how)
    assert {name: len(values) for name, values in found.items()} == {"student": 2, "teacher": 2}
    assert "denoising" in infer.table([{"name": "denoising", "batch": 1, "seconds": found}])


@pytest.mark.slow
def test_waiting_for_data_is_a_part_of_the_steps():
    found = data.measure(SMALL, clips=2, samples=1, steps=2)
    assert 0 < found["step"]["waited"] < found["step"]["seconds"]
    assert len(found["clips_a_second"]) == 3 and found["samples_a_second"] > 0
    assert "share of a step" in data.table(found)


def test_growth_is_the_exponent_of_the_power_law():
    assert scale.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    assert scale.exponent([1, 2, 4], [0, 7, 7]) == pytest.approx(0)  # one rank gathers nothing
    few, many = (scale.expected(World(frames=frames), 2) for frames in (2, 4))
    assert few["bytes"] == many["bytes"] and 2 < many["seconds"] / few["seconds"] < 4


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sequence", "--tokens", "66"], "error: --tokens 66: must divide by 4"),
        (["step", "--layers", "0"], "error: --layers 0: must be at least 1"),
        (["infer", "--repeats", "1"], "error: --repeats 1: must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, line):
    done = bench(*arguments)
    assert done.returncode == 2 and line in done.stderr


def test_a_rank_that_fails_is_an_error():
    with pytest.raises(RunError, match="a rank of 1 failed"):
        run_ranks("load", 1, folder="nowhere", size=ModelSize(2, 2, 32, 64).__dict__)

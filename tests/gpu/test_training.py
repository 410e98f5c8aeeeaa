"""Training on a GPU: in bf16 it is what a CPU does in float32, and it goes on where it was stopped."""

import json

import pytest
import torch

from dmd_ds.recipe import REPOSITORY, dump_recipe
from tests.distributed.launch import assert_fine, metrics, run_ranks, train
from tests.mini import make_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PARTS = {"generator": {"ema_decay": 0.5}, "gan": {"generator_weight": 0.1}, "regression": {"steps": 1, "teacher_steps": 2}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A warm-up step and three of DMD2, with its lines of the log."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, train(make_recipe(folder, **PARTS), ranks=1)


def test_losses_are_those_of_the_cpu(undisturbed):
    folder, lines = undisturbed
    recipe = make_recipe(folder, output_dir=str(folder / "cpu"), **PARTS)
    (folder / "cpu.yaml").write_text(dump_recipe(recipe))
    assert_fine(run_ranks(1, "dmd_ds/train.py", str(folder / "cpu.yaml"), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""))
    on_cpu = metrics(recipe)
    assert len(lines) == len(on_cpu) == 4
    for line, expected in zip(lines, on_cpu, strict=True):
        losses = {name: value for name, value in expected.items() if name.startswith("loss/")}
        assert losses and {name: line[name] for name in losses} == pytest.approx(losses, rel=0.1, abs=0.02)


def test_it_goes_on_where_it_was_stopped(undisturbed):
    folder, lines = undisturbed
    train(make_recipe(folder, output_dir=str(folder / "stopped"), max_steps=2, **PARTS), ranks=1)
    again = train(make_recipe(folder, output_dir=str(folder / "stopped"), **PARTS), ranks=1)
    assert len(again) == 4
    for line, expected in zip(again[2:], lines[2:], strict=True):
        names = [name for name in expected if name.startswith(("loss/", "grad_norm/"))]
        assert {name: line[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-2)


def test_states_that_lie_on_the_host_change_nothing_but_the_place(undisturbed):
    folder, lines = undisturbed
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_optimizer_offload.json").read_text())
    config["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's is compiled for a minute
    (folder / "offload.json").write_text(json.dumps(config))
    place = {"ds_config": str(folder / "offload.json")}
    recipe = make_recipe(folder, output_dir=str(folder / "host"), **PARTS | {"generator": PARTS["generator"] | place}, fake_score=place)
    offloaded = train(recipe, ranks=1)
    assert len(offloaded) == 4
    for line, expected in zip(offloaded, lines, strict=True):
        names = [name for name in expected if name.startswith(("loss/", "grad_norm/"))]
        assert {name: line[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=0.1, abs=0.02)

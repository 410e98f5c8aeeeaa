"""Every choice of a recipe that saves memory trains: the same numbers as plain PyTorch where nothing but the place changes."""

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_diffusers
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.planner.sizes import PUBLISHED
from dmd_ds.recipe import REPOSITORY, Data, Recipe, dump_recipe, load_recipe
from dmd_ds.shards import Shards
from dmd_ds.wan.tensors import read_header
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import TRANSFORMER, make_dataset, make_pipeline, make_transformer

STEPS = 4
LORA = {"lora_rank": 3, "lora_alpha": 12.0}


def ds_file(folder: Path, name: str, **optimizer) -> Path:
    """A shipped DeepSpeed JSON that gathers everything of the mini model, with the epsilon that comparisons need."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000}
    config["optimizer"]["params"] |= {"eps": EPSILON, **optimizer}
    file = folder / f"{name}{'-torch' if optimizer else ''}.json"
    file.write_text(json.dumps(config))
    return file


def recipe_of(folder: Path, name: str, ds_config: Path | None = None, generator: dict | None = None, **changes) -> Recipe:
    recipe = sharp_recipe(folder, name, max_steps=STEPS, data={"batch_size": 1}, **changes)
    chosen = {} if ds_config is None else {"ds_config": str(ds_config)}
    return recipe.model_copy(
        update={
            "generator": recipe.generator.model_copy(update={**(generator or {}), **chosen}),
            "fake_score": recipe.fake_score.model_copy(update=chosen),
        }
    )


def train_all(folder: Path, recipes: list[Recipe], module: str = "split_ranks") -> None:
    files = [folder / f"{number}-of-{module}.yaml" for number in range(len(recipes))]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(dump_recipe(recipe))
    assert_fine(run_ranks(2, "-m", f"tests.distributed.{module}", *map(str, files)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    make_pipeline(folder / "model")
    make_dataset(folder / "data", words=200)
    return folder


@pytest.fixture(scope="module")
def runs(world):
    """On 2 ranks in one job; `offload` stops after 2 steps and goes on from its checkpoint."""
    everything = ds_file(world, "zero3_parameter_offload", torch_adam=True)  # torch's Adam: DeepSpeed's is compiled for a minute
    runs = {
        "offload": recipe_of(world, "offload", everything),
        "activation offload": recipe_of(world, "activations", activation_offload=True),
        "all with LoRA": recipe_of(world, "all", everything, LORA, activation_offload=True),
    }
    first_half = runs["offload"].model_copy(update={"max_steps": 2})
    train_all(world, [first_half, *runs.values()])
    return runs


@pytest.fixture(scope="module")
def plain(world):
    whole, lora = recipe_of(world, "plain"), recipe_of(world, "plain", generator=LORA)
    return {"whole": plain_dmd2(whole, 2, EPSILON), "LoRA": plain_dmd2(lora, 2, EPSILON)}


@pytest.mark.parametrize("name, model", [("offload", "whole"), ("activation offload", "whole"), ("all with LoRA", "LoRA")])
def test_what_lies_on_the_host_trains_as_plain_pytorch(runs, plain, name, model):
    lines, generator, adapter = plain[model]
    assert_same_numbers(metrics(runs[name]), lines, 1e-4)
    assert_trained_as(runs[name], STEPS, generator, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3_optimizer_offload", "zero3_parameter_offload"])
def test_the_shipped_offload_trains_with_deepspeeds_own_adam(world, plain, name):
    recipe = recipe_of(world, name, ds_file(world, name))
    train_all(world, [recipe])
    assert_same_numbers(metrics(recipe), plain["whole"][0], 1e-4)
    assert_trained_as(recipe, STEPS, *plain["whole"][1:])


@pytest.mark.slow
def test_an_optimiser_on_nvme_trains_goes_on_and_is_exported(tmp_path):
    if not get_accelerator().get_op_builder("AsyncIOBuilder")().is_compatible():
        pytest.skip("libaio-dev is not installed, so DeepSpeed's async_io cannot be built")
    make_pipeline(tmp_path / "model")
    wide = TRANSFORMER | {"attention_head_dim": 72, "ffn_dim": 512, "num_layers": 4}  # DeepSpeed leaves less than 1 MB in memory
    make_transformer(config=wide).save_pretrained(tmp_path / "model" / "transformer")
    make_dataset(tmp_path / "data", words=200)
    disk = tmp_path / "disk"
    config = json.loads(ds_file(tmp_path, "zero3_optimizer_offload").read_text())
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": str(disk), "pin_memory": True}, "sub_group_size": 300_000}
    config["zero_optimization"] |= offload
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(config))
    recipe = recipe_of(tmp_path, "nvme", file, {"ema_decay": None})
    train_all(tmp_path, [recipe.model_copy(update={"max_steps": 2}), recipe])
    assert len([file for file in disk.rglob("*.swp") if file.stat().st_size > 2**20]) > 6  # weights and moments of some groups
    lines, generator, adapter = plain_dmd2(recipe, 2, EPSILON)
    assert_same_numbers(metrics(recipe), lines, 1e-4)
    assert_trained_as(recipe, STEPS, generator, adapter)
    to_diffusers(find_student(Path(recipe.output_dir)), tmp_path / "out")
    exported = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(exported["blocks.1.ffn.net.2.weight"], weights(recipe, STEPS, "generator")["transformer.blocks.1.ffn.net.2.weight"])


@pytest.mark.slow
def test_a_run_goes_on_under_another_optimiser(world):
    """DeepSpeed's Adam on the host, which is compiled for a minute, PyTorch's, and DeepSpeed's again."""
    deepspeeds, torchs = ds_file(world, "zero3_optimizer_offload"), ds_file(world, "generator_zero3")
    first, other, again = (recipe_of(world, "switched", file) for file in (deepspeeds, torchs, deepspeeds))
    train_all(world, [first.model_copy(update={"max_steps": 2}), other.model_copy(update={"max_steps": 3}), again])
    lines, generator, adapter = plain_dmd2(again, 2, EPSILON)
    assert_same_numbers(metrics(again), lines, 1e-4)
    assert_trained_as(again, STEPS, generator, adapter)


@pytest.fixture(scope="module")
def bf16_runs(world):
    parts = {"gan": {"generator_weight": 0.1, "r1_weight": 1.0, "blocks": [0, 1]}, "regression": {"steps": 1, "teacher_steps": 2}}
    runs = {
        "bf16 states": recipe_of(world, "bf16", ds_file(world, "zero3_bf16_states"), LORA | {"ema_decay": None}),
        "all parts": recipe_of(world, "all-parts", generator={"ema_decay": 0.5}, **parts),
    }
    train_all(world, list(runs.values()), "bf16_ranks")
    return runs


def test_without_fp32_masters_it_trains_in_bf16_and_all_it_keeps_of_a_weight_is_bf16(bf16_runs, plain):
    recipe = bf16_runs["bf16 states"]
    for line, other in zip(metrics(recipe), plain["LoRA"][0], strict=True):
        assert line["loss/fake_score"] == pytest.approx(other["loss/fake_score"], rel=0.01)
    early, late = weights(recipe, 2, "generator"), weights(recipe, STEPS, "generator")
    assert all((early[name] - late[name]).abs().max() > 1e-5 for name in early)
    checkpoint = Shards(Path(recipe.output_dir) / "checkpoints" / f"step_{STEPS:06d}" / "generator")
    kept = read_header(checkpoint.folder / "rank_00000.safetensors")
    assert {key.split("/")[0] for key in kept} == {"master", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16} and {weight.dtype for weight in late.values()} == {torch.float32}


def test_every_part_of_dmd2_trains_in_bf16_with_the_losses_of_fp32(bf16_runs):
    recipe = bf16_runs["all parts"]
    for line, other in zip(metrics(recipe), plain_dmd2(recipe, 2, EPSILON)[0], strict=True):
        losses = {name: value for name, value in other.items() if name.startswith("loss/")}
        assert losses and {name: line[name] for name in losses} == pytest.approx(losses, rel=0.05, abs=0.01)


def test_on_the_cpu_training_is_fp32_whatever_the_json_says_of_bf16(world):
    generator = load_recipe("tiny").generator
    config = read_ds_config("generator.ds_config", "ds_configs/zero3_bf16_states.json")
    assert complete_ds_config(config, generator, Data(path="none"), PUBLISHED["1.3b"])["bf16"] == {"enabled": False}


def nvme_file(folder: Path, section: str, **keys) -> Path:
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_optimizer_offload.json").read_text())
    config["zero_optimization"][section] = {"device": "nvme", **keys}
    file = folder / f"nvme-{section}.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    "section, keys, message",
    [
        ("offload_param", {"nvme_path": "/disk"}, "offload_param.device='nvme'; weights are loaded into memory"),
        ("offload_optimizer", {}, "offload_optimizer.device='nvme' needs a nvme_path beside it"),
        ("offload_optimizer", {"nvme_path": "/disk"}, "needs DeepSpeed's async_io, which cannot be built: install libaio-dev"),
        ("offload_optimizer", {"nvme_path": "/disk", "ratio": 0.5}, "offload_optimizer.ratio=0.5: must be 1, all of the states"),
    ],
)
def test_an_offload_that_cannot_be_is_one_line_that_names_the_file(tmp_path, monkeypatch, section, keys, message):
    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    monkeypatch.setattr(builder, "is_compatible", lambda self: False)
    file = nvme_file(tmp_path, section, **keys)
    with pytest.raises(UserError, match=f"{file.name}: .*{message}"):
        read_ds_config("generator.ds_config", str(file))
    monkeypatch.setattr(builder, "is_compatible", lambda self: True)
    if keys == {"nvme_path": "/disk"} and section == "offload_optimizer":
        assert read_ds_config("generator.ds_config", str(file))["zero_optimization"]["offload_optimizer"]["device"] == "nvme"
        monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
        monkeypatch.setattr("dmd_ds.parallel.engine.CUDA_HOME", None)
        with pytest.raises(UserError, match=f"{file.name}: .* which a CUDA toolkit builds: set CUDA_HOME"):
            read_ds_config("generator.ds_config", str(file))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation; did you mean 'zero_optimization"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2; this project shards weights, which is stage 3"),
        ({"zero_optimization": [3]}, "zero_optimization.stage=None"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size='big': input should be"),
        ({"zero_optimization": {"stage": 3, "overlap": True}}, "unknown key zero_optimization.overlap"),
        ({"optimizer": {"type": "SGD"}}, "optimizer.type='SGD': input should be 'Adam' or 'AdamW'"),
        ({"optimizer": {"params": {"epsilon": 1}}}, "unknown key optimizer.params.epsilon"),
        ({"train_batch_size": 64}, "unknown key train_batch_size"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled; this project trains in bf16"),
    ],
)
def test_a_deepspeed_json_that_says_what_it_cannot_names_file_and_key(tmp_path, change, message):
    config = json.loads((REPOSITORY / "ds_configs" / "tiny_zero3.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"mine.json: {re.escape(message)}"):
        read_ds_config("generator.ds_config", str(tmp_path / "mine.json"))

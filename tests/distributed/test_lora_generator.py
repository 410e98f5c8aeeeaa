"""A generator trained as LoRA on 2 ranks is the DMD2 of plain PyTorch, and every export of it is that generator."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_comfyui, to_diffusers, to_wan
from dmd_ds.lora import to_own_lora
from dmd_ds.recipe import dump_recipe
from dmd_ds.shards import Shards
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.guidance import add_guidance_embedding, fresh_weights
from dmd_ds.wan.original import GUIDANCE
from dmd_ds.wan.weights import whole_transformer
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.distributed.test_guidance_embedding import SHAPES
from tests.mini import TRANSFORMER, make_dataset, make_pipeline, make_transformer
from tools import export
from tools.convert_wan import convert

STEPS = 4
RANK, ALPHA = 3, 12.0
KINDS = ("stock", "fresh guidance")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two runs on 2 ranks over the same model: as it is, and with a fresh guidance embedding."""
    top = tmp_path_factory.mktemp("lora")
    make_pipeline(top / "model")
    make_dataset(top / "data", words=200)
    recipes, files = {}, []
    for kind in KINDS:
        recipe = sharp_recipe(
            top, kind, max_steps=STEPS, data={"batch_size": 1}, model={"guidance_embedding": kind != "stock"},
            validation={"every": STEPS, "prompts": 2},
        )  # fmt: skip
        generator = recipe.generator.model_copy(update={"lora_rank": RANK, "lora_alpha": ALPHA, "lr": 5e-3})
        recipes[kind] = recipe.model_copy(update={"generator": generator})
        files.append(top / f"{kind}.yaml")
        files[-1].write_text(dump_recipe(recipes[kind]))
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.fixture(scope="module", params=KINDS)
def recipe(world, request):
    return world[request.param]


@pytest.fixture(scope="module")
def student(recipe):
    return find_student(Path(recipe.output_dir))


def test_losses_norms_and_weights_are_those_of_plain_pytorch(recipe):
    embedding = fresh_weights(SHAPES, seed=0) if recipe.model.guidance_embedding else None
    lines, generator, adapter = plain_dmd2(recipe, 2, EPSILON, embedding)
    assert_same_numbers(metrics(recipe), lines, 1e-4)
    assert_trained_as(recipe, STEPS, generator, adapter)
    early, late = weights(recipe, 2, "generator"), weights(recipe, STEPS, "generator")
    assert all((early[name] - late[name]).abs().max() > 1e-5 for name in early if "lora_B" in name or GUIDANCE in name)


def test_a_checkpoint_holds_the_adapter_and_a_fresh_embedding_and_nothing_else(recipe):
    zero = Shards(Path(recipe.output_dir) / "checkpoints" / f"step_{STEPS:06d}" / "generator")
    adapter = [name for name in zero.shapes if ".lora_A." in name or ".lora_B." in name]
    others = zero.shapes.keys() - set(adapter)
    assert len(adapter) == 2 * 10 * 2
    assert others == ({f"transformer.{name}" for name in SHAPES} if recipe.model.guidance_embedding else set())


def adapted_denoiser(student) -> WanDenoiser:
    """The trained module itself: base, adapter and embedding, nothing merged and nothing folded."""
    transformer = whole_transformer(student.base, torch.float32)
    if student.takes_guidance:
        add_guidance_embedding(transformer)
    denoiser = WanDenoiser(transformer)
    denoiser.add_adapter(RANK, ALPHA)
    report = denoiser.load_state_dict({name: student.weights.read(name) for name in student.weights.shapes}, strict=False)
    assert not report.unexpected_keys
    return denoiser.eval()


@torch.no_grad()
def test_every_merged_export_is_the_trained_module(student, tmp_path):
    x, text, sigma = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 512, 16), torch.tensor([0.4, 0.9])
    guidance_B = torch.full((2,), student.recipe.score.guidance) if student.takes_guidance else None
    expected = adapted_denoiser(student)(x, sigma, text, guidance_B=guidance_B)
    base = WanDenoiser(whole_transformer(student.base, torch.float32))
    assert (expected - base(x, sigma, text)).abs().max() > 1e-2

    to_diffusers(student, tmp_path / "diffusers")
    to_wan(student, tmp_path / "wan")
    to_comfyui(student, tmp_path / "comfyui")
    merged = WanDenoiser(whole_transformer(tmp_path / "diffusers", torch.float32))
    torch.testing.assert_close(merged(x, sigma, text), expected, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "wan", tmp_path / "back", guidance=student.recipe.score.guidance if student.takes_guidance else None)
    back = WanDenoiser(whole_transformer(tmp_path / "back", torch.float32))
    torch.testing.assert_close(back(x, sigma, text), expected, atol=1e-5, rtol=1e-5)
    one_file = load_file(tmp_path / "comfyui" / "comfyui.safetensors")
    original = load_file(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    assert {name for name in original if name not in one_file} == {name for name in original if "guidance_embedding" in name}
    folded = {"time_embedding.2.bias"} if student.takes_guidance else set()
    assert {name for name in one_file if not torch.equal(one_file[name], original[name])} == folded


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_stock_diffusers_makes_the_same_videos_of_the_lora_as_of_the_merged_student(student, tmp_path, guidance):
    student = student.folded(guidance)  # where there is an embedding; None is the guidance of training
    to_diffusers(student, tmp_path / "student")
    to_own_lora(student, tmp_path / "lora")
    merged = WanPipeline.from_pretrained(tmp_path / "student")
    base = WanPipeline.from_pretrained(student.base, scheduler=merged.scheduler)

    def video(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(3)
        size = {"height": 32, "width": 32, "num_frames": 5}
        return torch.from_numpy(pipeline("a red circle", num_inference_steps=4, guidance_scale=1.0, output_type="np", **size).frames)

    before = video(base)
    base.load_lora_weights(tmp_path / "lora", weight_name="lora.safetensors")
    expected = video(merged)
    torch.testing.assert_close(video(base), expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 1e-3


def test_the_lora_file_is_the_adapter_bit_for_bit_under_the_names_of_others(student, tmp_path):
    to_own_lora(student, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    A, B = student.read_adapter("blocks.1.ffn.net.0.proj.weight")
    assert torch.equal(tensors["diffusion_model.blocks.1.ffn.0.lora_A.weight"], A) and A.shape == (RANK, 24)
    assert torch.equal(tensors["diffusion_model.blocks.1.ffn.0.lora_B.weight"], B) and B.shape == (48, RANK)
    assert float(tensors["diffusion_model.blocks.1.ffn.0.alpha"]) == ALPHA
    assert {"diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.cross_attn.o.alpha"} <= tensors.keys()
    assert len(tensors) == (4 * 10 * 2 + 3 if student.takes_guidance else 3 * 10 * 2)
    assert f"A LoRA of rank {RANK}" in (tmp_path / "lora" / "README.md").read_text()


def test_the_command_takes_no_rank_for_an_adapter_and_writes_it(recipe, tmp_path, monkeypatch, capsys):
    command = ["export.py", recipe.output_dir, str(tmp_path / "out"), "--format", "lora"]
    monkeypatch.setattr(sys, "argv", [*command, "--rank", "8"])
    with pytest.raises(SystemExit):
        export.main()
    expected = f"error: --rank 8: {recipe.output_dir} was trained as LoRA of rank {RANK}; leave --rank out"
    assert expected in capsys.readouterr().err.splitlines() and not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", command)
    export.main()
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n" and (tmp_path / "out" / "out.safetensors").is_file()


def test_a_disk_that_fills_leaves_no_half_of_an_adapter(world, tmp_path, full_disk):
    with full_disk(5_000), pytest.raises(UserError, match="out: cannot be written: File too large"):
        to_own_lora(find_student(Path(world["stock"].output_dir)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_over_another_base_is_refused_with_both_shapes(world, tmp_path):
    make_pipeline(tmp_path / "narrow")
    make_transformer(config={**TRANSFORMER, "ffn_dim": 40}).save_pretrained(tmp_path / "narrow" / "transformer")
    with pytest.raises(UserError, match=r"ffn.net.0.proj.lora_B.default.weight is \[48, 3\], over .* it would be \[40, 3\]"):
        find_student(Path(world["stock"].output_dir), str(tmp_path / "narrow"))

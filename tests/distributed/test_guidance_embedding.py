"""Guidance-embedded models on 2 ranks are the DMD2 of plain PyTorch: one that has its embedding, and one that is given a fresh one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_comfyui, to_diffusers, to_wan
from dmd_ds.generation import VideoModel
from dmd_ds.inputs import check_inputs
from dmd_ds.lora import to_lora
from dmd_ds.recipe import REPOSITORY, dump_recipe
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.guidance import add_guidance_embedding, fresh_weights
from dmd_ds.wan.original import GUIDANCE
from dmd_ds.wan.weights import empty_transformer, transformer_config, whole_transformer
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import TRANSFORMER, make_dataset, make_pipeline

STEPS = 4
WIDTH = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
SHAPES = {
    f"{GUIDANCE}.linear_1.weight": (WIDTH, TRANSFORMER["freq_dim"]),
    f"{GUIDANCE}.linear_1.bias": (WIDTH,),
    f"{GUIDANCE}.linear_2.weight": (WIDTH, WIDTH),
    f"{GUIDANCE}.linear_2.bias": (WIDTH,),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`stored` has a model with an embedding, `fresh` one without; a run on 2 ranks in each."""
    top = tmp_path_factory.mktemp("guidance")
    torch.manual_seed(5)
    embeddings = {"stored": {name: 0.2 * torch.randn(shape) for name, shape in SHAPES.items()}, "fresh": fresh_weights(SHAPES, seed=0)}
    recipes, files = {}, []
    for name, embedding in embeddings.items():
        folder = top / name
        make_dataset(folder / "data", words=200)
        file = make_pipeline(folder / "model") / "transformer" / "diffusion_pytorch_model.safetensors"
        changes = {"max_steps": STEPS, "data": {"batch_size": 1}, "validation": {"every": STEPS, "prompts": 2}}
        if name == "stored":
            save_file(load_file(file) | embedding, file)
        else:
            changes["model"] = {"guidance_embedding": True}
        recipes[name] = sharp_recipe(folder, "run", **changes)
        files.append(top / f"{name}.yaml")
        files[-1].write_text(dump_recipe(recipes[name]))
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes, embeddings


@pytest.mark.parametrize("kind", ["stored", "fresh"])
def test_losses_norms_and_weights_are_those_of_plain_pytorch(world, kind):
    recipes, embeddings = world
    recipe = recipes[kind]
    lines, generator, adapter = plain_dmd2(recipe, 2, EPSILON, embeddings[kind], one_pass=kind == "stored")
    logged = metrics(recipe)
    if kind == "stored":  # an adapter without effect yet: fake and real score are one, in one pass as in the other
        for first in (logged.pop(0), lines.pop(0)):
            assert first["loss/dm"] < 1e-12 and first["grad_norm/generator"] < 1e-6
    assert_same_numbers(logged, lines, 1e-4)
    assert_trained_as(recipe, STEPS, generator, adapter)
    trained = weights(recipe, STEPS, "generator")
    last = f"{GUIDANCE}.linear_2.weight"
    assert (trained[f"transformer.{last}"] - embeddings[kind][last]).abs().max() > 1e-4
    assert (Path(recipe.output_dir) / "samples" / f"step_{STEPS:06d}" / "contact_sheet.png").is_file()


def test_an_embedded_guidance_cannot_be_limited_to_some_levels(world):
    recipe = world[0]["stored"]
    limited = recipe.model_copy(update={"score": recipe.score.model_copy(update={"guidance_below": 0.9})})
    with pytest.raises(UserError, match="score.guidance_below=0.9: model.path=.* has its guidance embedded"):
        check_inputs(limited)


@pytest.mark.parametrize("kind", ["stored", "fresh"])
def test_exports_are_stock_models_at_the_guidance_of_training_or_another(tmp_path, world, kind):
    student = find_student(Path(world[0][kind].output_dir))
    to_wan(student, tmp_path / "wan")
    to_comfyui(student, tmp_path / "comfyui")
    to_diffusers(student, tmp_path / "diffusers")
    to_diffusers(student.folded(2.0), tmp_path / "other")
    error = to_lora(student, tmp_path / "lora", rank=24)
    assert error.matrices < 1e-3
    original = load_file(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    assert original.keys() - load_file(tmp_path / "comfyui" / "comfyui.safetensors").keys() == {
        f"guidance_embedding.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")
    }

    x, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 512, 16)
    sigma = torch.tensor([0.7])
    embedded = WanDenoiser(with_trained_weights(student))
    folded = {}
    for folder, guidance in (("diffusers", student.recipe.score.guidance), ("other", 2.0)):
        folded[folder] = WanDenoiser(whole_transformer(tmp_path / folder, torch.float32))(x, sigma, text)
        torch.testing.assert_close(folded[folder], embedded(x, sigma, text, guidance_B=torch.tensor([guidance])), atol=1e-5, rtol=1e-5)
    assert (folded["other"] - folded["diffusers"]).abs().max() > 1e-4


def with_trained_weights(student):
    """The student's transformer with its embedding, not folded."""
    transformer = add_guidance_embedding(empty_transformer(transformer_config(student.base)))
    transformer.load_state_dict({name: student.read(name) for name in student.names})
    return transformer.eval()


def test_an_embedded_teacher_is_sampled_in_one_pass(world):
    model = VideoModel(world[0]["stored"].model.path, CPU)
    settings = model.settings.changed(steps=2, frames=5, height=32, width=32)
    at_5, at_2 = (model.latents(["red circle"], [0], settings.changed(guidance=guidance)) for guidance in (5.0, 2.0))
    assert (at_5 - at_2).abs().max() > 1e-3
    calls = []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    model.latents(["red circle"], [0], settings)
    assert len(calls) == model.evaluations(settings) == 2


def test_a_model_without_an_embedding_has_nothing_to_fold(tmp_path, run):
    student = find_student(run)
    assert student.folded(3.0) is student
    command = [sys.executable, "tools/export.py", str(run), str(tmp_path / "out"), "--fold-guidance", "3"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 2 and not (tmp_path / "out").exists()
    assert ended.stderr.splitlines() == [f"error: {run}: has no guidance embedding to fold; leave --fold-guidance out"]

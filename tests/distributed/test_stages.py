"""The stages around DMD2 on 2 ranks, a sample a rank or a sample on both, are those of plain PyTorch; stopped and resumed too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_diffusers
from dmd_ds.generation import VideoModel, read_settings
from dmd_ds.inputs import check_inputs
from dmd_ds.lora import to_own_lora
from dmd_ds.monitor import OF_THE_MACHINE
from dmd_ds.recipe import dump_recipe
from dmd_ds.source import find_source
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.guidance import fresh_weights
from dmd_ds.wan.weights import whole_transformer
from tests.distributed.comparing import EPSILON, assert_same_weights, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_stages import plain_stage
from tests.distributed.test_guidance_embedding import SHAPES
from tests.mini import make_dataset, make_pipeline

STEPS = 4
CPU = torch.device("cpu")
LORA = {"lora_rank": 3, "lora_alpha": 12.0, "lr": 5e-3}
# huber_c of the size of the differences: far below them the loss is a distance, whose gradient jumps with the rounding of a sum
CFG = {"stage": "cfg_distill", "cfg_distill": {"guidance_min": 1.0, "guidance_max": 6.0, "huber_c": 0.05}}
PLUGINS = "tests.distributed.plain_stages"
REWARD = {
    "stage": "reward",
    "reward": {"rewards": {f"{PLUGINS}:redness": 2.0, f"{PLUGINS}:steadiness": 0.5}, "frames": "all", "penalty": 3.0},
    "generator": LORA,
}
HALF_STEP = {"stage": "regression", "regression": {"target": "half_step"}, "sampling": {"solver": "ode"}}
SHARED = {"parallel": {"ulysses": 2}, "data": {"batch_size": 2}}  # both ranks work on every sample
WAYS = {
    "cfg on data": CFG,
    "cfg on data, sequence parallel, cooling down": {**CFG, **SHARED, "generator": {"cooldown_steps": 2}},
    "cfg on the teacher's path, LoRA": {
        **CFG, "cfg_distill": {**CFG["cfg_distill"], "input": "teacher", "teacher_steps": 3}, "generator": LORA,
    },
    "regression to the end": {"stage": "regression", "regression": {"target": "end", "teacher_steps": 5}},
    "regression by half steps": HALF_STEP,
    "regression by consistency": {"stage": "regression", "regression": {"target": "consistency", "teacher_steps": 5}},
    "reward": REWARD,
    "reward, sequence parallel": {**REWARD, **SHARED},
    "reward through two steps": {**REWARD, "reward": {**REWARD["reward"], "steps": 2, "frames": [0, 3]}},
}  # fmt: skip
RESUMED = ("cfg on data", "reward")
LOOKED_AT = {"every": 2, "prompts": 2, "teacher_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on two ranks for every way, and those that are stopped at half and go on, all in one job."""
    world = tmp_path_factory.mktemp("stages")
    make_pipeline(world / "model")
    make_dataset(world / "data", words=200)
    recipes, files = {}, []

    def add(key, name, changes, **more):
        changes = {"data": {"batch_size": 1}, "fake_score": None, "max_steps": STEPS, **changes, **more}
        recipe = sharp_recipe(world, name, **changes)
        files.append(world / f"{len(files)}.yaml")
        files[-1].write_text(dump_recipe(recipe))
        recipes[key] = recipe

    for way, changes in WAYS.items():
        add(way, way, changes, **({"validation": LOOKED_AT} if way in RESUMED else {}))
    for way in RESUMED:
        add("half", f"{way}, resumed", WAYS[way], validation=LOOKED_AT, max_steps=2)
        add(("resumed", way), f"{way}, resumed", WAYS[way], validation=LOOKED_AT)
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.mark.parametrize("way", WAYS)
def test_losses_norms_and_weights_are_those_of_plain_pytorch(runs, way):
    recipe = runs[way]
    embedding = fresh_weights(SHAPES, seed=0) if recipe.stage == "cfg_distill" else None
    lines, trained = plain_stage(recipe, 2, EPSILON, embedding)
    logged = metrics(recipe)
    assert len(logged) == len(lines) == STEPS
    for line, other in zip(logged, lines, strict=True):
        for key, number in other.items():
            assert line[key] == pytest.approx(number, rel=1e-4, abs=1e-9), key
    early, late = weights(recipe, 2, "generator"), weights(recipe, STEPS, "generator")
    assert_same_weights(late, {f"transformer.{name}": weight for name, weight in trained.items()}, 1e-4)
    moved = [name for name in early if (early[name] - late[name]).abs().max() > 1e-5]
    assert len(moved) > 0.9 * len(early)


@pytest.mark.parametrize("way", RESUMED)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(runs, way):
    whole, resumed = runs[way], runs["resumed", way]
    assert_same_weights(weights(resumed, STEPS, "generator"), weights(whole, STEPS, "generator"), 0.0)
    strip = [[{key: line[key] for key in line if key not in OF_THE_MACHINE} for line in metrics(recipe)] for recipe in (whole, resumed)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("way", RESUMED)
def test_what_it_makes_is_looked_at_beside_its_teacher_or_its_start(runs, way):
    folder = Path(runs[way].output_dir) / "samples"
    assert (folder / "teacher" / "001.mp4").is_file() and (folder / f"step_{STEPS:06d}" / "contact_sheet.png").is_file()
    assert 0 < metrics(runs[way])[-1]["validation/trained/drift"] < 1


# ---- what comes of guidance distillation, and of an adapter -----------------------------------------------------------


@torch.no_grad()
def velocity(folder_or_model, guidance: float | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 2, 4, 4, generator=generator), torch.randn(2, 512, 16, generator=generator)
    transformer = folder_or_model if isinstance(folder_or_model, torch.nn.Module) else whole_transformer(folder_or_model, torch.float32)
    guidance_B = None if guidance is None else torch.full((2,), guidance)
    return WanDenoiser(transformer)(x, torch.tensor([0.4, 0.9]), text, guidance_B=guidance_B)


@pytest.mark.parametrize("way", ["cfg on data", "cfg on the teacher's path, LoRA"])
def test_a_guided_student_is_exported_with_its_embedding_or_folded_and_read_as_it_lies_there(runs, way, tmp_path):
    run = Path(runs[way].output_dir)
    student = find_student(run)
    to_diffusers(student, tmp_path / "told")
    to_diffusers(student.folded(3.0), tmp_path / "folded")
    as_it_lies = find_source(str(run)).load(CPU).denoiser.transformer
    at_3, at_6 = (velocity(tmp_path / "told", guidance) for guidance in (3.0, 6.0))
    assert (at_3 - at_6).abs().max() > 1e-4
    torch.testing.assert_close(velocity(tmp_path / "folded"), at_3, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity(as_it_lies, 3.0), at_3, atol=1e-5, rtol=1e-5)
    told, folded = (read_settings(tmp_path / name) for name in ("told", "folded"))
    assert told == find_source(str(run)).settings and told.few_step is None
    assert (told.guidance, folded.guidance, folded.steps) == (runs[way].score.guidance, 1.0, told.steps)
    assert "Guidance of 1 to 6 distilled into one pass" in (tmp_path / "told" / "README.md").read_text()
    assert VideoModel(str(tmp_path / "told"), CPU).evaluations(told) == told.steps


def test_a_fresh_embedding_is_read_in_the_precision_of_the_rest(runs, monkeypatch):
    monkeypatch.setattr("dmd_ds.generation.inference_dtype", lambda device: torch.bfloat16)  # as on an accelerator
    loaded = find_source(runs["cfg on data"].output_dir).load(CPU).denoiser.transformer
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_guided_student_is_where_dmd2_starts_its_real_score_in_one_pass(runs, tmp_path):
    to_diffusers(find_student(Path(runs["cfg on data"].output_dir)), tmp_path / "told")
    data = {"path": runs["cfg on data"].data.path, "batch_size": 1}
    inputs = check_inputs(sharp_recipe(tmp_path, "run", model={"path": str(tmp_path / "told")}, data=data))
    assert (inputs.guidance_embedding, inputs.two_pass_guidance, inputs.embedded_guidance) == ("stored", 1.0, 5.0)
    again = sharp_recipe(tmp_path, "again", **CFG, fake_score=None, model={"path": str(tmp_path / "told")}, data=data)
    with pytest.raises(UserError, match="has its guidance embedded already, stage=cfg_distill has nothing to teach it"):
        check_inputs(again)


def test_more_or_less_of_an_adapter_lies_on_the_line_through_base_and_student(runs, tmp_path):
    run = Path(runs["reward"].output_dir)
    student, name = find_student(run), "blocks.1.ffn.net.2.weight"
    base, whole = student.read_base(name), student.read(name)
    assert (whole - base).abs().max() > 1e-3
    for scale in (0.0, 0.5, 2.0):
        torch.testing.assert_close(student.scaled(scale).read(name), base + scale * (whole - base))
        loaded = find_source(str(run), lora_scale=scale).load(CPU).denoiser.transformer
        torch.testing.assert_close(loaded.get_parameter(name), base + scale * (whole - base))
    to_own_lora(student.scaled(0.5), tmp_path / "lora")
    assert float(load_file(tmp_path / "lora" / "lora.safetensors")["diffusion_model.blocks.1.ffn.2.alpha"]) == 0.5 * LORA["lora_alpha"]
    with pytest.raises(UserError, match="was not trained as LoRA .*, it has no scale"):
        find_source(runs["cfg on data"].output_dir, lora_scale=0.5)
    with pytest.raises(UserError, match="--lora-scale 0.5: .* is no checkpoint"):
        find_source(runs["reward"].model.path, lora_scale=0.5)


def test_rewards_start_from_a_student_that_samples_as_it_was_distilled(runs, tmp_path):
    to_diffusers(find_student(Path(runs["regression by consistency"].output_dir)), tmp_path / "student")
    changes = {**REWARD, "fake_score": None, "model": {"path": str(tmp_path / "student")}, "data": {"path": runs["reward"].data.path}}
    assert check_inputs(sharp_recipe(tmp_path, "run", **changes)).recipe.stage == "reward"
    with pytest.raises(UserError, match="sampling is not that of model.path=.*, which was distilled for 4 steps, sigmas 1.000"):
        check_inputs(sharp_recipe(tmp_path, "run", **changes, sampling={"steps": 2}))
    with pytest.raises(UserError, match=r"reward.frames=\[5\]: a video has 5, numbered from 0"):
        check_inputs(sharp_recipe(tmp_path, "run", **{**changes, "reward": {**REWARD["reward"], "frames": [5]}}))

"""An original Wan2.1 folder is the same model as the diffusers folder it would convert to, in every part."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from dmd_ds.errors import UserError
from dmd_ds.export import copy_other_parts, find_student, to_diffusers, whole_folder
from dmd_ds.generation import VideoModel
from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.image import embed_image, load_image_encoder
from dmd_ds.wan.weights import find_model, transformer_tensors
from tests.distributed.launch import metrics, train
from tests.mini import TRANSFORMER, make_dataset, make_parts, make_recipe, make_transformer
from tools.convert_wan import convert

CPU = torch.device("cpu")
SHAPE = (16, 2, 4, 4)
T2V = {**TRANSFORMER, "in_channels": 16, "out_channels": 16}
I2V = {**T2V, "in_channels": 36, "image_dim": 160, "added_kv_proj_dim": 24}
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}
TOP = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2", "quant_conv": "conv1", "post_quant_conv": "conv2"}
TOP |= {"mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2"}


def vae_name(name: str) -> str:
    """The published VAE file's name of a tensor of diffusers' VAE."""
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{4 * int(found[1]) + 3}", name)
    name = name.replace("down_blocks", "downsamples")
    for theirs, original in {**TOP, **RESIDUAL}.items():
        inside_block = "samples." in name or "middle" in name
        if theirs in RESIDUAL and not inside_block:
            continue
        name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{original}", name)
    return name


def text_tensors(state: dict) -> dict[str, torch.Tensor]:
    out = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for layer in range(1 + max(int(name.split(".")[2]) for name in state if ".block." in name)):
        theirs, ours = f"encoder.block.{layer}.layer", f"blocks.{layer}"
        for part in "qkvo":
            out[f"{ours}.attn.{part}.weight"] = state[f"{theirs}.0.SelfAttention.{part}.weight"]
        out[f"{ours}.pos_embedding.embedding.weight"] = state[f"{theirs}.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{ours}.norm1.weight"] = state[f"{theirs}.0.layer_norm.weight"]
        out[f"{ours}.norm2.weight"] = state[f"{theirs}.1.layer_norm.weight"]
        for part, name in {"gate.0": "wi_0", "fc1": "wi_1", "fc2": "wo"}.items():
            out[f"{ours}.ffn.{part}.weight"] = state[f"{theirs}.1.DenseReluDense.{name}.weight"]
    return out


def clip_tensors(state: dict) -> dict[str, torch.Tensor]:
    out = {
        "log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(3, 4), "visual.head": torch.zeros(160, 8),
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"visual.pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        out[f"visual.post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for layer in range(3):
            theirs, ours = f"encoder.layers.{layer}", f"visual.transformer.{layer}"
            out[f"{ours}.attn.to_qkv.{kind}"] = torch.cat([state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            names = {
                "attn.proj": "self_attn.out_proj",
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1",
                "mlp.2": "mlp.fc2",
            }
            out |= {f"{ours}.{new}.{kind}": state[f"{theirs}.{old}.{kind}"] for new, old in names.items()}
    return out


def make_folders(top: Path, config: dict) -> None:
    """`top/model` in diffusers' layout and `top/original`, of the same random weights."""
    parts = make_parts()
    parts["vae"] = AutoencoderKLWan(base_dim=4)
    parts["scheduler"] = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    transformer, kind = make_transformer(config=config), WanPipeline
    if config is I2V:
        clip = CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            hidden_act="gelu",
        )
        parts["image_encoder"], kind = CLIPVisionModel(clip), WanImageToVideoPipeline
        parts["image_processor"] = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    kind(**parts, transformer=transformer).save_pretrained(top / "model")
    original = convert(top / "model", top / "original")
    torch.save({vae_name(name): tensor for name, tensor in parts["vae"].state_dict().items()}, original / "Wan2.1_VAE.pth")
    torch.save(text_tensors(parts["text_encoder"].state_dict()), original / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(top / "model" / "tokenizer", original / "google" / "umt5-xxl")
    if config is I2V:
        torch.save(clip_tensors(parts["image_encoder"].state_dict()), original / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("t2v")
    make_folders(top, T2V)
    return top


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("i2v")
    make_folders(top, I2V)
    return top


def test_the_same_latents_and_pixels_come_out(folders):
    models = [VideoModel(str(folders / name), CPU) for name in ("model", "original")]
    settings = models[0].settings.changed(steps=3, frames=5, height=32, width=32)
    latents = [model.latents(["red circle"], [1], settings) for model in models]
    assert torch.equal(*latents) and latents[0].std() > 0.1
    assert torch.equal(*(model.videos(["a blue square"], [2], settings) for model in models))


def test_the_same_is_seen_of_a_picture(image_folders):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    models = [VideoModel(str(image_folders / name), CPU) for name in ("model", "original")]
    settings = models[0].settings.changed(steps=2, frames=5, height=32, width=48)
    assert torch.equal(*(model.latents(["circle"], [1], settings, image=model.condition([picture], settings)) for model in models))
    embeds = [embed_image(load_image_encoder(image_folders / name, CPU), picture) for name in ("model", "original")]
    assert torch.equal(*embeds) and embeds[0].shape == (5, 160)


def test_a_run_starts_from_it_and_exports_a_whole_pipeline(folders, tmp_path):
    make_dataset(folders / "data", samples=4, shapes=(SHAPE,))
    runs = {}
    for name in ("model", "original"):
        changes = {"model": {"path": str(folders / name)}, "output_dir": str(tmp_path / name), "max_steps": 2, "data": {"batch_size": 1}}
        runs[name] = make_recipe(folders, **changes, validation={"every": 2, "prompts": 1})
        train(runs[name], ranks=1)
    kept = [[{key: line[key] for key in line if "loss" in key} for line in metrics(recipe)] for recipe in runs.values()]
    assert kept[0] == kept[1] and kept[0]
    to_diffusers(find_student(tmp_path / "original"), tmp_path / "student")
    pipeline = WanPipeline.from_pretrained(tmp_path / "student")
    expected = load_autoencoder(folders / "model", CPU).state_dict()
    for name, tensor in pipeline.vae.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert pipeline.transformer.config.num_layers == 2 and pipeline.text_encoder.config.num_heads == 2


def test_a_disk_that_fills_while_the_parts_are_written_is_one_line(folders, tmp_path, full_disk):
    with full_disk(), pytest.raises(UserError, match="out: cannot be written: .*File too large"), whole_folder(tmp_path / "out") as folder:
        copy_other_parts(folders / "original", folder)
    assert not list(tmp_path.iterdir())


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


def without(pattern: str):
    return lambda folder: next(folder.glob(pattern)).unlink()


def code_in_a_pickle(folder: Path) -> None:
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(pickle.dumps(Code()))


def edit_vae(change):
    def edit(folder: Path) -> None:
        file = folder / "Wan2.1_VAE.pth"
        tensors = dict(torch.load(file, weights_only=True))
        change(tensors)
        file.unlink()
        torch.save(tensors, file)

    return edit


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without("*VAE*"), r"\*VAE\*\.pth is missing"),
        (without("models_t5*"), r"models_t5\*\.pth is missing"),
        (without("google/*/tokenizer_config.json"), "tokenizer_config.json is missing"),
        (code_in_a_pickle, r"models_t5_umt5-xxl-enc-bf16\.pth: not readable as a file of tensors"),
        (
            edit_vae(lambda tensors: tensors.pop("decoder.head.2.bias")),
            r"Wan2\.1_VAE\.pth: 1 missing tensors, the first is decoder\.conv_out",
        ),
        (edit_vae(lambda tensors: tensors.update(extra=torch.zeros(1))), r"Wan2\.1_VAE\.pth: 1 unknown tensors, the first is extra"),
        (lambda folder: (folder / "Wan2.1_VAE.pth").write_bytes(b"PK"), r"Wan2\.1_VAE\.pth: not readable as a file of tensors"),
    ],
    ids=["no VAE", "no text encoder", "no tokenizer", "code in a pickle", "a tensor too few", "a tensor too many", "cut short"],
)
def test_a_folder_that_is_not_whole_is_one_line(folders, tmp_path, spoil, message, capsys):
    shutil.copytree(folders / "original", tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(UserError, match=message):
        VideoModel(str(tmp_path / "spoilt"), CPU)
    assert "this ran" not in capsys.readouterr().out


def test_an_image_to_video_folder_needs_its_clip(image_folders, tmp_path):
    shutil.copytree(image_folders / "original", tmp_path / "blind")
    next((tmp_path / "blind").glob("models_clip*")).unlink()
    with pytest.raises(UserError, match=r"models_clip\*\.pth is missing"):
        find_model(str(tmp_path / "blind"))


def test_a_hub_name_is_its_local_copy_or_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.path=ours/mini: no such folder here, and the hub's ours/mini cannot be had"):
        find_model("ours/mini")
    copy = tmp_path / "models--ours--mini" / "snapshots" / ("0" * 40)
    shutil.copytree(folders / "original", copy)
    (tmp_path / "models--ours--mini" / "refs").mkdir()
    (tmp_path / "models--ours--mini" / "refs" / "main").write_text("0" * 40)
    assert transformer_tensors(find_model("ours/mini")).keys() == transformer_tensors(folders / "model").keys()

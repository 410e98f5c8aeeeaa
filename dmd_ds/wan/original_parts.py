"""The parts of an original Wan2.1 folder as diffusers' and transformers' modules: their sizes are read from the tensors.

config.json and diffusion_pytorch_model*.safetensors (the denoiser), Wan2.1_VAE.pth, models_t5_*.pth with its tokenizer in
google/umt5-xxl, and for image to video models_clip_*.pth. What the tensors do not tell is what every published Wan2.1 has.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from dmd_ds.errors import UserError, read_json_mapping
from dmd_ds.wan.original import diffusers_config, to_diffusers
from dmd_ds.wan.tensors import WEIGHTS, Stored, check_tensors, read_pickle, stored_tensors

TOKENIZER = "google/umt5-xxl"
PARTS = ("*VAE*.pth", "models_t5*.pth", f"{TOKENIZER}/tokenizer_config.json")
IMAGE_PART = "models_clip*.pth"
CLIP_HEAD_WIDTH = 80  # of the ViT-H that Wan2.1 sees images with
FLOW_SHIFT = 5.0  # of the original sampler, but for image to video at 480p

TEXT_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
IMAGE_BLOCK = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
IMAGE_TOP = {"patch_embedding": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}


def is_original(folder: Path) -> bool:
    """Whether the folder is laid out as the original's; diffusers' has a model_index.json."""
    # os.path: unlike Path.is_dir it takes any text for a name, the longest too
    return os.path.isdir(folder) and not (folder / "model_index.json").is_file() and any(folder.glob(f"{WEIGHTS}*.safetensors*"))


def find_part(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder}: {pattern} is missing from that folder, which is laid out as an original Wan2.1's")
    return found[0]


def read_transformer(folder: Path) -> tuple[dict, dict[str, Stored]]:
    """(diffusers configuration, tensors by diffusers' names) of an original folder; its config.json may be missing."""
    renamed = {}
    for name, tensor in stored_tensors(folder).items():
        translated = to_diffusers(name)
        if translated is None:
            raise UserError(f"{tensor.file}: {name} is no tensor of a Wan2.1 transformer")
        renamed[translated] = tensor
    config = read_json_mapping(folder / "config.json") if (folder / "config.json").is_file() else {}
    return diffusers_config({name: tensor.shape for name, tensor in renamed.items()}, config, str(folder)), renamed


def filled(module: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> nn.Module:
    """The module, made without weights, with these; `UserError` unless they are its own."""
    in_file = {name: Stored(file, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    check_tensors(file, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, in_file)
    module.load_state_dict(tensors, assign=True)
    return module


def shape_of(tensors: Mapping[str, torch.Tensor], name: str, dimensions: int, file: Path) -> torch.Size:
    if name not in tensors:
        raise UserError(f"{file}: {name} is not in it; this is no file of a Wan2.1 folder")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{file}: {name} is {list(shape)}, a tensor of {dimensions} dimensions is expected")
    return shape


def layers_of(tensors: Iterable[str], stem: str) -> int:
    """How many numbers follow the stem among the names; those of more layers than that are then unknown tensors."""
    return len({name.removeprefix(stem).split(".")[0] for name in tensors if name.startswith(stem)})


def autoencoder(folder: Path) -> AutoencoderKLWan:
    file = find_part(folder, PARTS[0])
    tensors = read_pickle(file)
    width, latents = shape_of(tensors, "encoder.conv1.weight", 5, file)[0], shape_of(tensors, "conv2.weight", 5, file)[0]
    if latents != 16:
        raise UserError(f"{file}: {latents} latent channels, a Wan2.1 VAE has 16")
    with init_empty_weights():
        vae = AutoencoderKLWan(base_dim=width)
    return filled(vae, convert_wan_vae_to_diffusers(tensors), file)


def text_encoder(folder: Path) -> UMT5EncoderModel:
    file = find_part(folder, PARTS[1])
    tensors = read_pickle(file)
    vocabulary, width = shape_of(tensors, "token_embedding.weight", 2, file)
    buckets, heads = shape_of(tensors, "blocks.0.pos_embedding.embedding.weight", 2, file)
    renamed = {"shared.weight": tensors["token_embedding.weight"], "encoder.embed_tokens.weight": tensors["token_embedding.weight"]}
    for name, tensor in tensors.items():
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        if inside and inside[2] in TEXT_BLOCK:
            renamed[f"encoder.block.{inside[1]}.{TEXT_BLOCK[inside[2]]}.weight"] = tensor
        elif name == "norm.weight":
            renamed["encoder.final_layer_norm.weight"] = tensor
        elif name != "token_embedding.weight":
            raise UserError(f"{file}: {name} is no tensor of Wan2.1's text encoder")
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shape_of(tensors, "blocks.0.attn.q.weight", 2, file)[0] // heads,
        d_ff=shape_of(tensors, "blocks.0.ffn.fc1.weight", 2, file)[0],
        num_layers=layers_of(tensors, "blocks."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with init_empty_weights():
        encoder = UMT5EncoderModel(config)
    return filled(encoder, renamed, file)


def image_encoder(folder: Path) -> tuple[CLIPImageProcessorPil, CLIPVisionModel]:
    """CLIP's eye; its text half is left out. The original stretches a picture to CLIP's square and crops nothing."""
    file = find_part(folder, IMAGE_PART)
    tensors = {name.removeprefix("visual."): tensor for name, tensor in read_pickle(file).items() if name.startswith("visual.")}
    width, _, patch, _ = shape_of(tensors, "patch_embedding.weight", 4, file)
    size = patch * math.isqrt(shape_of(tensors, "pos_embedding", 3, file)[1] - 1)
    shape_of(tensors, "cls_embedding", 3, file)
    if width % CLIP_HEAD_WIDTH or not size:
        raise UserError(f"{file}: width {width} and {size} pixels; CLIP's width is a multiple of {CLIP_HEAD_WIDTH}, and it sees a square")
    renamed = {
        "embeddings.class_embedding": tensors["cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": tensors["pos_embedding"][0],
    }
    for name, tensor in tensors.items():
        inside = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
        module, _, kind = name.rpartition(".")
        if inside and inside[2] == "attn.to_qkv":
            if not tensor.ndim or len(tensor) != 3 * width:
                raise UserError(f"{file}: visual.{name} is {list(tensor.shape)}, not three of width {width}")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{inside[1]}.self_attn.{part}_proj.{kind}"] = third
        elif inside and inside[2] in IMAGE_BLOCK:
            renamed[f"encoder.layers.{inside[1]}.{IMAGE_BLOCK[inside[2]]}.{kind}"] = tensor
        elif module in IMAGE_TOP:
            renamed[f"{IMAGE_TOP[module]}.{kind}"] = tensor
        elif name not in ("cls_embedding", "pos_embedding", "head"):
            raise UserError(f"{file}: visual.{name} is no tensor of Wan2.1's image encoder")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(tensors, "transformer.0.mlp.0.weight", 2, file)[0],
        num_hidden_layers=layers_of(tensors, "transformer."),
        num_attention_heads=width // CLIP_HEAD_WIDTH,
        image_size=size,
        patch_size=patch,
        hidden_act="gelu",
    )
    with init_empty_weights():
        encoder = CLIPVisionModel(config)
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, do_center_crop=False), filled(encoder, renamed, file)


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)

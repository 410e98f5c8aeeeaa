"""Where a model lies, what its transformer is, and its weights, read a tensor at a time into a module that ZeRO-3 has sharded.

A model is a diffusers folder or an original Wan2.1 folder; its content tells which. Tensors go by diffusers' names.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from dmd_ds.errors import UserError, read_json_mapping
from dmd_ds.recipe import find_folder, validated
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.autoencoder import TIME_STRIDE
from dmd_ds.wan.guidance import add_guidance_embedding, has_guidance_embedding
from dmd_ds.wan.original import diffusers_config
from dmd_ds.wan.original_parts import is_original
from dmd_ds.wan.tensors import Stored, check_tensors, stored_tensors

CONFIG_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "patch_size")
SIZES = (*CONFIG_KEYS, "freq_dim", "ffn_dim", "image_dim")  # what tensors tell too
UNUSED = "norm_added_q"  # in the published image-to-video folders, and in no model: diffusers passes it over too


def find_model(path: str) -> Path:
    """The folder that `model.path` names: one of here, one that ships, or the copy of a hub's repository; checked for its parts."""
    folder = Path(path) if is_original(Path(path)) else find_hub_copy(path) if is_hub_name(path) else None
    if folder is None or not is_original(folder):
        folder = folder or find_folder("model.path", path, "model_index.json")
        check_diffusers_parts(path, folder)
        return folder
    for part in (*original_parts.PARTS, *([original_parts.IMAGE_PART] if takes_image(transformer_config(folder)) else [])):
        original_parts.find_part(folder, part)
    return folder


def is_hub_name(path: str) -> bool:
    """`organisation/name`, and nothing here has that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not os.path.exists(path)


def find_hub_copy(name: str) -> Path:
    """The local copy of a hub's repository, downloaded when it is not there yet."""
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path={name}: no such folder here, and the hub's {name} cannot be had: {reason}") from error


def check_diffusers_parts(path: str, folder: Path) -> None:
    read_json_mapping(folder / "model_index.json")
    configs = ["transformer/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"]
    weights = ["transformer", "vae", "text_encoder"]
    if (folder / configs[0]).is_file() and takes_image(transformer_config(folder)):
        configs += ["image_encoder/config.json", "image_processor/preprocessor_config.json"]
        weights.append("image_encoder")
    for part in configs:
        if not (folder / part).is_file():
            raise UserError(f"model.path={path}: {part} is missing from that folder")
    for part in weights:
        stored_tensors(folder / part)


def transformer_config(model: Path) -> dict:
    """Of a Wan2.1 text-to-video or image-to-video model, diffusers' keys; `UserError` for another."""
    if is_original(model):
        path, config = model, original_parts.read_transformer(model)[0]
    else:
        path = model / "transformer" / "config.json"
        config = read_json_mapping(path)
    if config.get("_class_name") != "WanTransformer3DModel":
        raise UserError(f"{path}: {config.get('_class_name')!r} is no WanTransformer3DModel")
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise UserError(f"{path}: the key {missing[0]} is missing")
    config = {**config, **validated(diffusers_parts.Transformer, config, str(path)).model_dump(exclude_unset=True)}
    channels, latents = config["in_channels"], config["out_channels"]
    # noised latents; then a mask of the frames that are given, and their latents
    expected = latents + TIME_STRIDE + latents if takes_image(config) else latents
    if channels != expected:
        kind = "image-to-video" if takes_image(config) else "text-to-video"
        raise UserError(f"{path}: in_channels={channels}, a Wan2.1 {kind} model of {latents} latent channels has {expected}")
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(f"{path}: pos_embed_seq_len={config['pos_embed_seq_len']}, a first-and-last-frame model, which is not supported")
    if not is_original(model):
        check_sizes(path, config, {name: tensor.shape for name, tensor in transformer_tensors(model).items()})
    return config


def check_sizes(path: Path, config: dict, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`UserError` unless a configuration is that of tensors of these shapes: before anything so large is built as it may say."""
    of_tensors = diffusers_config(shapes, {"num_heads": config["num_attention_heads"]}, str(path.parent))
    for key in SIZES:
        if key in config and config[key] != of_tensors[key]:
            raise UserError(f"{path}: {key}={config[key]}, the tensors beside it are of {of_tensors[key]}")


def takes_image(config: dict) -> bool:
    """Whether a transformer of this configuration is an image-to-video model; older files leave `image_dim` out."""
    return config.get("image_dim") is not None


def diffusers_tensors(folder: Path) -> dict[str, Stored]:
    """Those of a diffusers transformer's own folder, by name."""
    return {name: tensor for name, tensor in stored_tensors(folder).items() if UNUSED not in name}


def transformer_tensors(model: Path) -> dict[str, Stored]:
    """Those of a model's transformer, by name."""
    return original_parts.read_transformer(model)[1] if is_original(model) else diffusers_tensors(model / "transformer")


def empty_transformer(config: dict) -> WanTransformer3DModel:
    """A transformer of this configuration whose weights are still to be loaded."""
    return WanTransformer3DModel.from_config(config)


def renew_buffers(transformer: WanTransformer3DModel) -> None:
    """Makes the rotary tables again: under zero.Init in bf16 they come out of rounded positions."""
    config = transformer.config
    rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    for name, buffer in rope.named_buffers():
        old = getattr(transformer.rope, name)
        old.data = buffer.to(old.device)


def load_weights(
    module: nn.Module,
    model: Path,
    shard: Callable[[nn.Parameter, torch.Tensor], torch.Tensor],
    fresh: Mapping[str, torch.Tensor],
) -> None:
    """Fills the module from the model, one tensor at a time; `shard` cuts a whole tensor to this rank's part.

    `fresh` holds what the model does not have.
    """
    stored, parameters = transformer_tensors(model), dict(module.named_parameters())
    check_tensors(model, {name: parameter.ds_shape for name, parameter in parameters.items() if name not in fresh}, stored)
    for name, parameter in parameters.items():
        parameter.ds_tensor.data.copy_(shard(parameter, fresh[name] if name in fresh else stored[name].read()))


def whole_transformer(model: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """A model's transformer, unsharded, with its guidance embedding where it has one."""
    stored = transformer_tensors(model)
    with init_empty_weights():
        transformer = empty_transformer(transformer_config(model))
        if has_guidance_embedding(stored):
            add_guidance_embedding(transformer)
    check_tensors(model, {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}, stored)
    transformer.load_state_dict({name: tensor.read().to(dtype) for name, tensor in stored.items()}, assign=True)
    return transformer

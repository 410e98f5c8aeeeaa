"""Weights in: a diffusers folder, read one tensor at a time into a module that ZeRO-3 has already sharded.

Weights out: safetensors written one tensor at a time.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors import SafetensorError, safe_open
from torch import nn

from dmd_ds.errors import UserError, read_json
from dmd_ds.recipe import find_folder
from dmd_ds.wan.autoencoder import TIME_STRIDE

WEIGHTS = "diffusion_pytorch_model"
STEMS = (WEIGHTS, "model")  # what diffusers and what transformers call their files
INDEX = f"{WEIGHTS}.safetensors.index.json"
UNUSED = "norm_added_q"  # in the published image-to-video folders, and in no model: diffusers passes it over too
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# ---- in ---------------------------------------------------------------------------------------------------------------


def find_model(path: str) -> Path:
    """The diffusers Wan folder that `model.path` names."""
    folder = find_folder("model.path", path, "model_index.json")
    configs = ["transformer/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"]
    weights = ["transformer", "vae", "text_encoder"]
    if (folder / configs[0]).is_file() and takes_image(transformer_config(folder)):
        configs += ["image_encoder/config.json", "image_processor/preprocessor_config.json"]
        weights.append("image_encoder")
    for part in configs:
        if not (folder / part).is_file():
            raise UserError(f"model.path={path}: {part} is missing from that folder")
    for part in weights:
        for file in sorted(set(weight_files(folder / part).values())):
            if not file.is_file():
                raise UserError(f"{file} is missing, though the index beside it names it")
    return folder


def transformer_config(model: Path) -> dict:
    """Of a Wan2.1 text-to-video or image-to-video model; `UserError` for another."""
    path = model / "transformer" / "config.json"
    config = read_json(path)
    if config.get("_class_name") != "WanTransformer3DModel":
        raise UserError(f"{path}: {config.get('_class_name')!r} is no WanTransformer3DModel")
    channels, latents = config["in_channels"], config["out_channels"]
    # noised latents; then a mask of the frames that are given, and their latents
    expected = latents + TIME_STRIDE + latents if takes_image(config) else latents
    if channels != expected:
        kind = "image-to-video" if takes_image(config) else "text-to-video"
        raise UserError(f"{path}: in_channels={channels}, a Wan2.1 {kind} model of {latents} latent channels has {expected}")
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(f"{path}: pos_embed_seq_len={config['pos_embed_seq_len']}, a first-and-last-frame model, which is not supported")
    return config


def takes_image(config: dict) -> bool:
    """Whether a transformer of this configuration is an image-to-video model; older files leave `image_dim` out."""
    return config.get("image_dim") is not None


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


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor, of a folder with one safetensors file or an index of several."""
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            try:
                with safe_open(single, framework="pt") as file:
                    return dict.fromkeys(file.keys(), single)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{single}: not readable as safetensors: {error}") from error
        if index.is_file():
            return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    raise UserError(f"{folder}: holds no weights ({' or '.join(f'{stem}.safetensors' for stem in STEMS)}, or its index)")


def transformer_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor of a transformer."""
    return {name: file for name, file in weight_files(folder).items() if UNUSED not in name}


def load_weights(module: nn.Module, folder: Path, shard: Callable[[nn.Parameter, torch.Tensor], torch.Tensor]) -> None:
    """Fills the module from the folder, one tensor at a time; `shard` cuts a whole tensor to this rank's part."""
    files = transformer_files(folder)
    parameters = dict(module.named_parameters())
    for problem, names in (("missing", parameters.keys() - files.keys()), ("unknown", files.keys() - parameters.keys())):
        if names:
            raise UserError(f"{folder}: {len(names)} {problem} tensors, the first is {sorted(names)[0]}")
    for name, parameter in parameters.items():
        try:
            with safe_open(files[name], framework="pt") as file:
                whole = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{files[name]}: {name} cannot be read: {error}") from error
        if tuple(whole.shape) != tuple(parameter.ds_shape):
            raise UserError(f"{files[name]}: {name} is {list(whole.shape)}, the configuration asks for {list(parameter.ds_shape)}")
        parameter.ds_tensor.data.copy_(shard(parameter, whole))


# ---- out --------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterator[torch.Tensor]) -> None:
    """One safetensors file, written a tensor at a time in the order of `shapes`; never more than one is held.

    The format: 8 bytes with the header's length, a JSON header of types, shapes and offsets, the tensors' bytes.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors:
            file.write(tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def split_by_size(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, largest: int) -> Iterable[dict[str, tuple[int, ...]]]:
    """The tensors in files of at most `largest` bytes each (a larger tensor gets a file of its own)."""
    part, size = {}, 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * dtype.itemsize
        if part and size + bytes_ > largest:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += bytes_
    yield part


def save_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    largest_file: int = 5 * 10**9,
) -> None:
    """Safetensors with diffusers' names: one file, or several with an index. `read` gives the tensor of a name."""
    parts = list(split_by_size(shapes, dtype, largest_file))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{WEIGHTS}.safetensors" if len(parts) == 1 else f"{WEIGHTS}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / name, part, dtype, map(read, part))
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

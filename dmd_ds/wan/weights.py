"""Weights in: a diffusers folder, read one tensor at a time into a module that ZeRO-3 has already sharded.

Weights out: safetensors written one tensor at a time.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors import SafetensorError, safe_open
from torch import nn

from dmd_ds.errors import UserError, read_json
from dmd_ds.recipe import find_folder
from dmd_ds.wan.autoencoder import TIME_STRIDE
from dmd_ds.wan.guidance import add_guidance_embedding, has_guidance_embedding
from dmd_ds.wan.original import GUIDANCE

WEIGHTS = "diffusion_pytorch_model"
STEMS = (WEIGHTS, "model")  # what diffusers and what transformers call their files
INDEX = f"{WEIGHTS}.safetensors.index.json"
UNUSED = "norm_added_q"  # in the published image-to-video folders, and in no model: diffusers passes it over too
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


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
        stored_tensors(folder / part)
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


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, not yet read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        try:
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file}: {self.name} cannot be read: {error}") from error


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable as safetensors: {error}") from error
    for name, (_, kind) in found.items():
        if kind not in TYPES:
            raise UserError(f"{file}: {name} is stored as {kind}; this project reads {', '.join(TYPES)}")
    return {name: Stored(file, name, shape, TYPES[kind]) for name, (shape, kind) in found.items()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder with one safetensors file or an index of several, by name."""
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return read_header(single)
        if index.is_file():
            named = read_json(index)["weight_map"]
            missing = [file for file in sorted(set(named.values())) if not (folder / file).is_file()]
            if missing:
                raise UserError(f"{folder / missing[0]} is missing, though {index.name} names it")
            found = {name: tensor for file in sorted(set(named.values())) for name, tensor in read_header(folder / file).items()}
            absent = sorted(named.keys() - found.keys())
            if absent:
                raise UserError(f"{folder / named[absent[0]]}: {absent[0]} is not in it, though {index.name} says so")
            return found
    raise UserError(f"{folder}: holds no weights ({' or '.join(f'{stem}.safetensors' for stem in STEMS)}, or its index)")


def transformer_tensors(folder: Path) -> dict[str, Stored]:
    """Those of a diffusers transformer, by name."""
    return {name: tensor for name, tensor in stored_tensors(folder).items() if UNUSED not in name}


def check_tensors(folder: Path, shapes: Mapping[str, Sequence[int]], stored: Mapping[str, Stored]) -> None:
    """`UserError` unless the folder holds exactly these tensors, each of its shape."""
    for problem, names in (("missing", shapes.keys() - stored.keys()), ("unknown", stored.keys() - shapes.keys())):
        if names:
            raise UserError(f"{folder}: {len(names)} {problem} tensors, the first is {sorted(names)[0]}")
    for name, tensor in stored.items():
        if tensor.shape != tuple(shapes[name]):
            raise UserError(f"{tensor.file}: {name} is {list(tensor.shape)}, the configuration asks for {list(shapes[name])}")


def load_weights(
    module: nn.Module,
    folder: Path,
    shard: Callable[[nn.Parameter, torch.Tensor], torch.Tensor],
    fresh: Mapping[str, torch.Tensor],
) -> None:
    """Fills the module from the folder, one tensor at a time; `shard` cuts a whole tensor to this rank's part.

    `fresh` holds what the folder does not have.
    """
    stored, parameters = transformer_tensors(folder), dict(module.named_parameters())
    check_tensors(folder, {name: parameter.ds_shape for name, parameter in parameters.items() if name not in fresh}, stored)
    for name, parameter in parameters.items():
        parameter.ds_tensor.data.copy_(shard(parameter, fresh[name] if name in fresh else stored[name].read()))


def whole_transformer(folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer of a diffusers folder, unsharded, with its guidance embedding where it has one."""
    transformer, stored = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype), transformer_tensors(folder)
    if has_guidance_embedding(stored):
        add_guidance_embedding(transformer).to(dtype)
        embedding = {name: tensor.read() for name, tensor in stored.items() if name.startswith(GUIDANCE)}
        transformer.load_state_dict(embedding, strict=False)
    return transformer


# ---- out --------------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What a tensor will be, before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, specs: Mapping[str, Spec], tensors: Iterator[torch.Tensor]) -> None:
    """One safetensors file, written a tensor at a time in the order of `specs`; never more than one is held.

    The format: 8 bytes with the header's length, a JSON header of types, shapes and offsets, the tensors' bytes.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor, spec in zip(tensors, specs.values(), strict=True):
            file.write(tensor.detach().to(spec.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def split_by_size(specs: Mapping[str, Spec], largest: int) -> Iterable[dict[str, Spec]]:
    """The tensors in files of at most `largest` bytes each (a larger tensor gets a file of its own)."""
    part, size = {}, 0
    for name, spec in specs.items():
        if part and size + spec.nbytes > largest:
            yield part
            part, size = {}, 0
        part[name] = spec
        size += spec.nbytes
    yield part


def save_weights(folder: Path, specs: Mapping[str, Spec], read: Callable[[str], torch.Tensor], largest_file: int = 5 * 10**9) -> None:
    """Safetensors named as diffusers and Wan name theirs: one file, or several with an index. `read` gives the tensor of a name."""
    parts = list(split_by_size(specs, largest_file))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{WEIGHTS}.safetensors" if len(parts) == 1 else f"{WEIGHTS}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / name, part, map(read, part))
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

"""Files of tensors: safetensors read and written one tensor at a time, and pickles that may hold tensors and nothing else."""

import dataclasses
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from dmd_ds.errors import UserError, read_json
from dmd_ds.recipe import validated

WEIGHTS = "diffusion_pytorch_model"
STEMS = (WEIGHTS, "model")  # what diffusers and what transformers call their files
INDEX = f"{WEIGHTS}.safetensors.index.json"
BROKEN_PICKLE = (  # what torch.load raises of bytes that are not what it wrote
    *(pickle.UnpicklingError, RuntimeError, OSError, EOFError, struct.error),
    *(LookupError, ValueError, TypeError, AttributeError, OverflowError, AssertionError, MemoryError),
)
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


# ---- in ---------------------------------------------------------------------------------------------------------------


class WeightIndex(BaseModel):
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\\x00]+\.safetensors$")]]  # files of the same folder and of no other


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
            named = validated(WeightIndex, read_json(index), str(index)).weight_map
            missing = [file for file in sorted(set(named.values())) if not (folder / file).is_file()]
            if missing:
                raise UserError(f"{folder / missing[0]} is missing, though {index.name} names it")
            found = {name: tensor for file in sorted(set(named.values())) for name, tensor in read_header(folder / file).items()}
            absent = sorted(named.keys() - found.keys())
            if absent:
                raise UserError(f"{folder / named[absent[0]]}: {absent[0]} is not in it, though {index.name} says so")
            return found
    raise UserError(f"{folder}: holds no weights ({' or '.join(f'{stem}.safetensors' for stem in STEMS)}, or its index)")


def check_tensors(folder: Path, shapes: Mapping[str, Sequence[int]], stored: Mapping[str, Stored]) -> None:
    """`UserError` unless the folder holds exactly these tensors, each of its shape."""
    for problem, names in (("missing", shapes.keys() - stored.keys()), ("unknown", stored.keys() - shapes.keys())):
        if names:
            raise UserError(f"{folder}: {len(names)} {problem} tensors, the first is {sorted(names)[0]}")
    for name, tensor in stored.items():
        if tensor.shape != tuple(shapes[name]):
            raise UserError(f"{tensor.file}: {name} is {list(tensor.shape)}, the configuration asks for {list(shapes[name])}")


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, by name, left on disk until they are used. Nothing in it is run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except BROKEN_PICKLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not readable as a file of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: holds other things than named tensors")
    return tensors


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

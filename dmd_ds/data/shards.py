"""The files of a latents dataset, checked where they are read: index.json, and of each shard a .jsonl and a .safetensors.

A dataset may come from elsewhere: whatever its files hold is a dataset or a `UserError`, and no name in them leads out of its folder.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from dmd_ds.errors import UserError, parse_json, read_json_mapping, read_jsonl
from dmd_ds.recipe import validated
from dmd_ds.section import NotNegative, Positive, Section

FORMAT = "dmd_ds latents 2"
WITHOUT_CHECKSUMS = "dmd_ds latents 1"
INDEX = "index.json"
NEGATIVE = "negative.safetensors"
NEGATIVE_EMBEDS = "negative_embeds"
STORED_TYPES = ("F32", "F16", "BF16")
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

Crc32 = Annotated[int, Field(ge=0, lt=2**32)]


class Shard(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,100}$", description="of its two files in the dataset's folder, but for their endings")
    samples: Positive


class Index(Section):
    format: Literal["dmd_ds latents 2"]
    fps: Annotated[float, Field(gt=0)]
    shards: list[Shard] = Field(min_length=1)
    negative_crc32: Crc32
    image_embeds_shape: tuple[Positive, Positive] | None = Field(None, description="[L, D]; None: made for text to video")


class About(Section):
    """A line of a shard's .jsonl."""

    caption: str
    source: str
    frames: Positive
    height: Positive
    width: Positive
    latents_shape: tuple[Positive, Positive, Positive, Positive]
    prompt_tokens: Positive
    crc32: dict[str, Crc32]


class Place(BaseModel):
    """Of a tensor, in the header of a safetensors file."""

    dtype: str
    shape: tuple[NotNegative, ...]
    data_offsets: tuple[NotNegative, NotNegative]


def read_places(path: Path) -> tuple[dict[str, Place], int]:
    """(the tensors of a safetensors file by name, where their bytes begin); `UserError` unless its header can be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length or length > LONGEST_HEADER:
                raise UserError(f"{path}: {size} bytes, which end within its header of {length}: cut short or no safetensors file")
            header = parse_json(file.read(length), path)
    except OSError as error:
        raise UserError(f"{path}: not readable: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is a {type(header).__name__}, not a mapping of tensors")
    where = f"{path}: its header"
    return {name: validated(Place, place, where, f"{name}.") for name, place in header.items() if name != "__metadata__"}, 8 + length


def check_shard(path: Path, shapes: list[dict[str, tuple[int, ...]]]) -> None:
    """`UserError` unless the file holds these tensors whole, for each sample their shapes by name, and nothing behind them."""
    places, begin = read_places(path)
    size, end = path.stat().st_size, begin
    for number, of_sample in enumerate(shapes):
        for name, shape in of_sample.items():
            place = places.get(f"{number}.{name}")
            if place is None:
                raise UserError(f"{path}: sample {number}: {name} is not in it")
            if place.shape != shape or place.dtype not in STORED_TYPES:
                found, types = f"{place.dtype} {list(place.shape)}", " or ".join(STORED_TYPES)
                raise UserError(f"{path}: sample {number}: {name} is {found}, the .jsonl beside it says {types} {list(shape)}")
            end = max(end, begin + place.data_offsets[1])
            if begin + place.data_offsets[1] > size:
                expected = begin + max(place.data_offsets[1] for place in places.values())
                raise UserError(f"{path}: sample {number}: {name} is not whole: the file has {size} bytes, its header says {expected}")
    if size != end:
        raise UserError(f"{path}: {size} bytes, the header's {len(shapes)} samples take {end}")


def read_tensor(path: Path, name: str, where: str, crc32: int) -> torch.Tensor:
    """A tensor whose bytes have this checksum; `where` names it in errors."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {where} cannot be read: {error}") from error
    found = checksum(tensor)
    if found != crc32:
        raise UserError(f"{path}: {where} is damaged: its bytes have CRC-32 {found:08x}, {crc32:08x} were written; copy the file again")
    return tensor


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


# ---- of a whole dataset -----------------------------------------------------------------------------------------------


def read_index(path: Path) -> Index:
    index = read_json_mapping(path)
    found = index.get("format")
    if found == WITHOUT_CHECKSUMS:
        raise UserError(f"{path}: format {found!r} has no checksums, this version reads {FORMAT!r}: encode the clips again")
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}, this version reads {FORMAT!r}")
    return validated(Index, index, str(path))


def read_lines(path: Path) -> list[About]:
    """Those of a shard's .jsonl; `UserError` names the line."""
    return [validated(About, line, f"{path}:{number}") for number, line in read_jsonl(path)]


def read_shard(folder: Path, shard: Shard, shapes: Callable[[About], dict[str, tuple[int, ...]]]) -> list[About]:
    """What a shard holds; `shapes` gives those of a sample's tensors, by name. `UserError` unless they are there, whole."""
    tensors, metadata = folder / f"{shard.name}.safetensors", folder / f"{shard.name}.jsonl"
    for path in (tensors, metadata):
        if not path.is_file():
            raise UserError(f"{path} is missing, though {INDEX} names it")
    samples = read_lines(metadata)
    if len(samples) != shard.samples:
        raise UserError(f"{metadata}: {len(samples)} samples, the index says {shard.samples}")
    for number, about in enumerate(samples):
        if shapes(about).keys() != about.crc32.keys():
            raise UserError(f"{metadata}: sample {number}: crc32 is of {', '.join(about.crc32)}, not of {', '.join(shapes(about))}")
    check_shard(tensors, [shapes(about) for about in samples])
    return samples


def read_negative(path: Path, crc32: int) -> torch.Tensor:
    """The embeddings `[L, D]` of the negative prompt."""
    places, _ = read_places(path)
    place = places.get(NEGATIVE_EMBEDS)
    if place is None or len(place.shape) != 2 or 0 in place.shape or place.dtype not in STORED_TYPES:
        found = "nothing" if place is None else f"{place.dtype} {list(place.shape)}"
        raise UserError(f"{path}: {NEGATIVE_EMBEDS} is {found}, not {' or '.join(STORED_TYPES)} [L, D]")
    return read_tensor(path, NEGATIVE_EMBEDS, NEGATIVE_EMBEDS, crc32)

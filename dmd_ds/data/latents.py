"""A latents dataset: what tools/encode_videos.py writes and training reads.

    index.json            format, frames a second, the shards and how many samples each holds, `negative_crc32` of the bytes in
                          negative.safetensors; for image to video also `image_embeds_shape`, [L, D]
    shard-00000.safetensors   for each sample i: `{i}.latents` [C, T, H, W] and `{i}.prompt_embeds` [L, D], without padding;
                          for image to video also `{i}.first_frame_latents` [C, T, H, W] and `{i}.image_embeds` [L, D]
    shard-00000.jsonl     for each sample, a line: caption, source, frames, height, width, latents_shape, prompt_tokens, and
                          `crc32`, the checksum of each of its tensors' bytes

Samples of one latents shape form a bucket; a global batch is of one bucket, so that every rank does the same work. Opened, a
dataset is checked but for the tensors' bytes, and these whenever they are read.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dmd_ds.data.shards import (
    FORMAT,
    INDEX,
    NEGATIVE,
    NEGATIVE_EMBEDS,
    About,
    checksum,
    read_index,
    read_negative,
    read_shard,
    read_tensor,
)
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import find_folder


@dataclasses.dataclass(frozen=True)
class FirstFrame:
    """A sample's first frame, as an image-to-video model is shown it."""

    latents: torch.Tensor  # [C, T, H, W]: of the frame and grey ones behind it
    embeds: torch.Tensor  # [L, D]: what CLIP sees

    def to(self, dtype: torch.dtype) -> "FirstFrame":
        return FirstFrame(self.latents.to(dtype), self.embeds.to(dtype))


@dataclasses.dataclass(frozen=True)
class Sample:
    latents: torch.Tensor  # [C, T, H, W]
    prompt_embeds: torch.Tensor  # [L, D]
    caption: str


class LatentsWriter:
    """Writes a dataset shard by shard; it becomes readable when `close` writes its index."""

    def __init__(self, folder: Path, fps: float, negative_embeds_LD: torch.Tensor, samples_a_shard: int = 256):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.fps, self.samples_a_shard = folder, fps, samples_a_shard
        self.negative_embeds_LD = negative_embeds_LD
        self.tensors: dict[str, torch.Tensor] = {}
        self.lines: list[dict[str, Any]] = []
        self.shards: list[dict[str, Any]] = []
        self.image_embeds_shape: list[int] | None = None

    def add(self, latents_CTHW: torch.Tensor, prompt_embeds_LD: torch.Tensor, first_frame: FirstFrame | None = None, **about: Any) -> None:
        """One sample; `first_frame` for all of a dataset or for none."""
        number = len(self.lines)
        shape = None if first_frame is None else list(first_frame.embeds.shape)
        assert shape == self.image_embeds_shape or not (self.lines or self.shards)
        self.image_embeds_shape = shape
        tensors = {"latents": latents_CTHW, "prompt_embeds": prompt_embeds_LD}
        if first_frame is not None:
            tensors |= {"first_frame_latents": first_frame.latents, "image_embeds": first_frame.embeds}
        # copies: clips may share a caption, and safetensors refuses tensors that share memory
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        self.tensors |= {f"{number}.{name}": tensor for name, tensor in tensors.items()}
        crc32 = {name: checksum(tensor) for name, tensor in tensors.items()}
        self.lines.append({**about, "latents_shape": list(latents_CTHW.shape), "prompt_tokens": len(prompt_embeds_LD), "crc32": crc32})
        if len(self.lines) == self.samples_a_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        name = f"shard-{len(self.shards):05d}"
        save_file(self.tensors, self.folder / f"{name}.safetensors")
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.shards.append({"name": name, "samples": len(self.lines)})
        self.tensors, self.lines = {}, []

    def close(self) -> None:
        if self.lines:
            self._write_shard()
        save_file({NEGATIVE_EMBEDS: self.negative_embeds_LD.contiguous()}, self.folder / NEGATIVE)
        index = {"format": FORMAT, "fps": self.fps, "shards": self.shards, "negative_crc32": checksum(self.negative_embeds_LD)}
        if self.image_embeds_shape is not None:
            index["image_embeds_shape"] = self.image_embeds_shape
        temporary = self.folder / f"{INDEX}.tmp"
        temporary.write_text(json.dumps(index, indent=1) + "\n")
        temporary.rename(self.folder / INDEX)


class LatentsDataset(torch.utils.data.Dataset):
    """Map-style: `dataset[i]` is a Sample, read when asked for."""

    def __init__(self, path: str):
        self.folder = find_folder("data.path", path, INDEX)
        index = read_index(self.folder / INDEX)
        self.fps: float = index.fps
        self.image_embeds_shape = index.image_embeds_shape
        self.negative_embeds_LD = read_negative(self.folder / NEGATIVE, index.negative_crc32)
        self.places: list[tuple[str, int]] = []  # (shard, number within it)
        self.about: list[dict[str, Any]] = []
        for shard in index.shards:
            lines = read_shard(self.folder, shard, self._shapes)
            self.about += [about.model_dump() for about in lines]
            self.places += [(shard.name, number) for number in range(len(lines))]

    def _shapes(self, about: About) -> dict[str, tuple[int, ...]]:
        """Of a sample's tensors, by name."""
        shapes = {"latents": about.latents_shape, "prompt_embeds": (about.prompt_tokens, self.negative_embeds_LD.shape[1])}
        if self.image_embeds_shape is None:
            return shapes
        return {**shapes, "first_frame_latents": about.latents_shape, "image_embeds": self.image_embeds_shape}

    def __len__(self) -> int:
        return len(self.places)

    @property
    def main_shape(self) -> tuple[int, int, int, int]:
        """`[C, T, H, W]` of the latents in the fullest bucket."""
        buckets = self.buckets()
        return max(buckets, key=lambda shape: len(buckets[shape]))

    @property
    def video(self) -> dict[str, float]:
        """Frames, height, width and frames a second of the videos in the fullest bucket."""
        first = self.buckets()[self.main_shape][0]
        return {key: self.about[first][key] for key in ("frames", "height", "width")} | {"fps": self.fps}

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, the negative one included."""
        return max(len(self.negative_embeds_LD), *(about["prompt_tokens"] for about in self.about))

    def _tensor(self, index: int, name: str) -> torch.Tensor:
        shard, number = self.places[index]
        crc32 = self.about[index]["crc32"][name]
        return read_tensor(self.folder / f"{shard}.safetensors", f"{number}.{name}", f"sample {number}: {name}", crc32)

    def latents(self, index: int) -> torch.Tensor:
        """`[C, T, H, W]`."""
        return self._tensor(index, "latents")

    def prompt_embeds(self, index: int) -> torch.Tensor:
        """`[L, D]`, without padding."""
        return self._tensor(index, "prompt_embeds")

    def first_frame(self, index: int) -> FirstFrame:
        """For image to video only."""
        return FirstFrame(self._tensor(index, "first_frame_latents"), self._tensor(index, "image_embeds"))

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.latents(index), self.prompt_embeds(index), self.about[index]["caption"])

    def buckets(self) -> dict[tuple[int, int, int, int], list[int]]:
        """Sample indices by latents shape `[C, T, H, W]`, in a fixed order."""
        buckets: dict[tuple[int, int, int, int], list[int]] = {}
        for index, about in enumerate(self.about):
            buckets.setdefault(tuple(about["latents_shape"]), []).append(index)
        return dict(sorted(buckets.items()))


class BatchOrder:
    """Which samples step n sees: a function of (seed, step), so nothing of it needs saving.

    An epoch visits each bucket in random order, in global batches of one bucket each, the last one filled from the
    bucket's beginning; the batches of all buckets are then shuffled.
    """

    def __init__(self, buckets: dict[tuple, list[int]], global_batch_size: int, randomness: Randomness):
        self.buckets, self.size, self.randomness = buckets, global_batch_size, randomness
        self.steps_an_epoch = sum(math.ceil(len(indices) / global_batch_size) for indices in buckets.values())
        self.epoch, self.batches = -1, []

    def __call__(self, step: int) -> tuple[tuple, list[int]]:
        """(latents shape, dataset indices of the whole global batch)."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self._shuffled(epoch)
        return self.batches[place]

    def _shuffled(self, epoch: int) -> list[tuple[tuple, list[int]]]:
        batches = []
        for number, (shape, indices) in enumerate(self.buckets.items()):
            order = [indices[i] for i in self.randomness.permutation(f"bucket{number}", epoch, len(indices))]
            batch_count = math.ceil(len(order) / self.size)
            filled = (order * math.ceil(batch_count * self.size / len(order)))[: batch_count * self.size]
            batches += [(shape, filled[i * self.size : (i + 1) * self.size]) for i in range(batch_count)]
        return [batches[i] for i in self.randomness.permutation("batches", epoch, len(batches))]


class SizedOrder:
    """The same for training on prompts alone: any sample at any of the recipe's latents shapes, one of them drawn a step."""

    def __init__(self, shapes: list[tuple[int, ...]], samples: int, global_batch_size: int, randomness: Randomness):
        self.shapes, self.randomness = shapes, randomness
        self.order = BatchOrder({(): list(range(samples))}, global_batch_size, randomness)

    def __call__(self, step: int) -> tuple[tuple, list[int]]:
        """(latents shape, dataset indices of the whole global batch)."""
        return self.shapes[self.randomness.integer("size", step, len(self.shapes))], self.order(step)[1]


def pad_embeds(embeds: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """`[B, tokens, D]`: each `[L, D]` followed by zeros, of which at least one (see wan.denoiser.padding_bias)."""
    return torch.stack([torch.nn.functional.pad(embed, (0, 0, 0, tokens - len(embed))) for embed in embeds])

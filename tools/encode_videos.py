#!/usr/bin/env python3
"""Turns video files with captions into a latents dataset: VAE latents, text embeddings, metadata.

For an image-to-video MODEL also what it is shown of each clip's first frame.

    python tools/encode_videos.py CLIPS OUT --model MODEL --sizes 81x480x832 81x832x480 33x480x832 --fps 16

CLIPS is one of
    a .jsonl file       a line a clip: {"video_path": "a.mp4", "caption": "..."}
    a .json file        a list, as in videos2caption.json: [{"path": "a.mp4", "cap": "..."}, ...]
    a folder            every video in it that has a .txt of the same stem, which is its caption
Paths are relative to the file that names them. A broken clip is named, counted and skipped. Of several sizes (frames x height x
width) a clip goes to the one that loses least of it; training takes each step's samples from one size.
"""

import collections
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dmd_ds.commands import command_parser
from dmd_ds.data.latents import LatentsWriter
from dmd_ds.data.video import VideoSize, best_size, read_video, size_of_film
from dmd_ds.errors import UserError, one_line_errors, read_json, read_jsonl, read_text
from dmd_ds.wan.autoencoder import encode, latents_shape, load_autoencoder
from dmd_ds.wan.image import load_image_encoder, show_first_frame
from dmd_ds.wan.text import encode_prompts, load_text_encoder
from dmd_ds.wan.weights import find_model, takes_image, transformer_config

VIDEO_ENDINGS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}


@dataclasses.dataclass(frozen=True)
class Clip:
    path: Path
    caption: str


def parse_clip(where: str, record: object, folder: Path, path_key: str, caption_key: str) -> Clip:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a mapping with {path_key} and {caption_key}")
    path, caption = record.get(path_key), record.get(caption_key)
    caption = caption[0] if isinstance(caption, list) and caption else caption
    for key, value in ((path_key, path), (caption_key, caption)):
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} is {value!r}, not text")
    return Clip(folder / path, caption)


def list_clips(source: Path) -> list[Clip]:
    """The clips that a jsonl, a videos2caption.json or a folder names; `UserError` names file and line."""
    if source.is_dir():
        videos = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEO_ENDINGS)
        clips = [Clip(path, read_text(path.with_suffix(".txt")).strip()) for path in videos if path.with_suffix(".txt").is_file()]
        if not clips:
            raise UserError(f"{source}: {len(videos)} videos, none with a .txt of the same stem beside it")
        return clips
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix == ".jsonl":
        records = [(f"{source}:{number}", record) for number, record in read_jsonl(source)]
        keys = "video_path", "caption"
    else:
        content = read_json(source)
        if not isinstance(content, list):
            raise UserError(f"{source}: a list of clips is expected, not a {type(content).__name__}")
        records = [(f"{source}: clip {number}", record) for number, record in enumerate(content)]
        keys = "path", "cap"
    if not records:
        raise UserError(f"{source}: names no clip")
    return [parse_clip(where, record, source.parent, *keys) for where, record in records]


def read_ahead(clips: list[Clip], sizes: list[VideoSize], fps: float, workers: int) -> Iterator[tuple[Clip, np.ndarray]]:
    """Each clip with its frames `[T, H, W, 3]`, in order, decoded by so many threads while others are encoded; broken ones are
    named on stderr and left out."""

    def read(clip: Clip) -> np.ndarray | UserError:
        try:
            size = best_size(sizes, size_of_film(clip.path, fps)) if len(sizes) > 1 else sizes[0]
            return read_video(clip.path, *size, fps)
        except UserError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        ahead: collections.deque[tuple[Clip, Future]] = collections.deque()
        coming = iter(tqdm(clips, desc="encoding", unit="clip", file=sys.stderr, mininterval=5))
        while True:
            ahead.extend((clip, pool.submit(read, clip)) for clip in itertools.islice(coming, workers + 1 - len(ahead)))
            if not ahead:
                return
            clip, frames = ahead.popleft()
            if isinstance(frames.result(), UserError):
                print(f"skipped: {frames.result()}", file=sys.stderr)
            else:
                yield clip, frames.result()


def in_batches(read: Iterable[tuple[Clip, np.ndarray]], most: int) -> Iterator[list[tuple[Clip, np.ndarray]]]:
    """Neighbours of one shape together, at most so many."""
    for _, alike in itertools.groupby(read, key=lambda one: one[1].shape):
        while batch := list(itertools.islice(alike, most)):
            yield batch


def encode_videos(
    source: Path, out: Path, model: Path, sizes: list[VideoSize], fps: float, negative: str, workers: int = 2, batch: int = 1
) -> int:
    """Writes the dataset and returns how many clips it holds; skipped ones are named on stderr."""
    clips = list_clips(source)
    if not fps > 0:
        raise UserError(f"--fps {fps}: must be above 0")
    for name, value in (("--workers", workers), ("--batch", batch)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    for size in sizes:
        latents_shape(size, transformer_config(model), f"--sizes {size}: ")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; name another folder or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae, text = load_autoencoder(model, device), load_text_encoder(model, device)
    image_encoder = load_image_encoder(model, device) if takes_image(transformer_config(model)) else None
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    writer = LatentsWriter(unfinished, fps, encode_prompts(text, [negative])[0])
    embeds, written = {}, 0
    for together in in_batches(read_ahead(clips, sizes, fps, workers), batch):
        new = list(dict.fromkeys(clip.caption for clip, _ in together if clip.caption not in embeds))
        embeds |= zip(new, encode_prompts(text, new), strict=True) if new else {}
        pixels = torch.stack([torch.from_numpy(video_THW3).permute(3, 0, 1, 2) for _, video_THW3 in together])
        latents_BCTHW = encode(vae, pixels.float() / 127.5 - 1).to(stored).cpu()
        for (clip, video_THW3), latents_CTHW in zip(together, latents_BCTHW, strict=True):
            first_frame = None
            if image_encoder:
                first_frame = show_first_frame(image_encoder, vae, video_THW3[0], len(video_THW3)).to(stored)
            frames, height, width = video_THW3.shape[:3]
            about = {"caption": clip.caption, "source": clip.path.name, "frames": frames, "height": height, "width": width}
            writer.add(latents_CTHW, embeds[clip.caption], first_frame, **about)
        written += len(together)
    if not written:
        shutil.rmtree(unfinished)
        raise UserError(f"{source}: none of the {len(clips)} clips could be read")
    writer.close()
    unfinished.rename(out)  # over an empty folder, if there is one
    print(f"{out}: {written} clips encoded, {len(clips) - written} skipped")
    return written


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="videos with their captions, in one of the three forms")
    parser.add_argument("out", type=Path, metavar="OUT", help="the dataset's folder")
    parser.add_argument("--model", default="tiny-wan", help="diffusers Wan folder, or the name of a shipped one (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["81x480x832"], metavar="FRAMESxHEIGHTxWIDTH", help="(default: 81x480x832)")
    parser.add_argument("--fps", type=float, default=16, help="frames a second that are taken of a clip (default: %(default)s)")
    parser.add_argument("--negative-prompt", default="", help="what guidance pushes away from (default: empty)")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode clips ahead (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="neighbouring clips of one size that the VAE takes at once (default: 1)")
    a = parser.parse_args()
    with one_line_errors():
        sizes = [VideoSize.parse(size) for size in a.sizes]
        encode_videos(a.clips, a.out, find_model(a.model), sizes, a.fps, a.negative_prompt, a.workers, a.batch)


if __name__ == "__main__":
    main()

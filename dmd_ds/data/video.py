"""Video and image files: read at a wanted size and rate, written as H.264, laid side by side as a contact sheet or an animation.

Videos are uint8 `[T, H, W, 3]`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from dmd_ds.errors import UserError

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf,ogg"  # ffmpeg's names of what a film comes in
MOST_PIXELS = 2**26


class VideoSize(NamedTuple):
    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "VideoSize":
        """Of `81x480x832`: frames x height x width."""
        numbers = text.split("x")
        if len(numbers) != 3 or not all(re.fullmatch(r"[0-9]{1,6}", number) and int(number) for number in numbers):
            raise UserError(f"{text!r} is no size of a video; write frames x height x width, as 81x480x832")
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def best_size(sizes: Sequence[VideoSize], film: VideoSize) -> VideoSize:
    """The bucket that loses least of a film: one it is long enough for, of the nearest proportions, then the longest (of
    those it is too short for the shortest), then the nearest in area."""

    def loss(size: VideoSize) -> tuple[bool, float, int, float]:
        proportions = math.log(size.width / size.height) - math.log(film.width / film.height)
        area = math.log(size.width * size.height) - math.log(film.width * film.height)
        too_long = size.frames > film.frames
        return too_long, round(abs(proportions), 2), size.frames if too_long else -size.frames, abs(area)

    return min(sizes, key=loss)


def fit(frames_THW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled until it covers height x width, then cropped to it around the middle."""
    _, old_height, old_width, _ = frames_THW3.shape
    scale = max(height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if size != (old_height, old_width):
        pixels = torch.from_numpy(frames_THW3).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        frames_THW3 = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.ascontiguousarray(frames_THW3[:, top : top + height, left : left + width])


def open_film(path: Path) -> av.container.InputContainer:
    """A file that may come from elsewhere: one that only lists others, here or on a network, is no film."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return av.open(str(path), options=options, metadata_errors="replace")


def size_of_film(path: Path, fps: float) -> VideoSize:
    """How many frames a film has at `fps`, and its picture's size, from what it says of itself; `UserError` as in `read_video`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open_film(path) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video")
            stream = container.streams.video[0]
            seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
            if stream.codec_context is None or not stream.width or not stream.height:
                raise UserError(f"{path}: holds no frame that can be read")
            return VideoSize(max(1, round(seconds * fps)), stream.height, stream.width)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not readable as a video: {error}") from error


def read_video(path: Path, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """The first `frames` frames at `fps` (nearest in time) and that size; of a shorter film as many as it has, cut to
    4n + 1, the counts that the Wan VAE takes. `UserError` when the file cannot be read as a video."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kept, pieces = 0, []
    try:
        with open_film(path) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise UserError(f"{path}: holds no video that can be read")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            begin = last = None
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number / float(stream.average_rate or fps)
                begin = time if begin is None else begin
                picture = None
                # frame k of the result is the last one shown at time k / fps, with a little tolerance for rounding
                while kept < frames and time - begin >= kept / fps - 1e-3:
                    picture = frame.to_ndarray(format="rgb24")[None] if picture is None else picture
                    pieces.append(fit(picture, height, width))
                    kept += 1
                last = time
                if kept == frames:
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not readable as a video: {error}") from error
    if not pieces or last is None:
        raise UserError(f"{path}: holds no frame")
    return np.concatenate(pieces[: (kept - 1) // 4 * 4 + 1])


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """The picture, uint8 `[height, width, 3]`, turned as its EXIF data says; `UserError` when it cannot be read as one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:  # a small file can say so and take all memory
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {MOST_PIXELS} are read")
            picture_HW3 = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not readable as an image: {error}") from error
    return fit(picture_HW3[None], height, width)[0]


def write_video(path: Path, video_THW3: np.ndarray, fps: float) -> None:
    """H.264 in yuv420p, which every browser plays; written beside and renamed, so a file of this name is whole."""
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    iio.imwrite(
        temporary,
        video_THW3,
        plugin="pyav",
        codec="libx264",
        fps=fps,
        out_pixel_format="yuv420p",
    )
    temporary.rename(path)


def contact_sheet(rows: list[list[np.ndarray]], frames: int = 5, gap: int = 4) -> np.ndarray:
    """One picture: a row a prompt, a block of evenly chosen frames for each of its videos. All videos of one size."""

    def strip(video):
        chosen = video[np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)]
        return np.concatenate(list(chosen), axis=1)

    lines = []
    for videos in rows:
        strips = [strip(video) for video in videos]
        spacer = np.full((strips[0].shape[0], 3 * gap, 3), 255, np.uint8)
        line = [part for one in strips for part in (one, spacer)][:-1]
        lines += [np.concatenate(line, axis=1)]
    spacer = np.full((gap, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, spacer)][:-1])


def write_animation(path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[np.ndarray]], fps: float, across: int = 2) -> None:
    """An animated WebP that goes on for ever: for each caption a row of videos, one a column, under the columns' names.

    All videos of one size; `across` captions stand side by side. Written beside and renamed.
    """
    width, gap, line = 112, 4, 16  # pixels: of a video, between two, of a line of text
    (first, *_), *_ = rows.values()
    frames, height = len(first), round(width * first.shape[1] / first.shape[2])
    block = len(columns) * (width + gap) + 2 * gap
    lines = -(-len(rows) // across)
    canvas = Image.new("RGB", (across * block - 3 * gap, line + lines * (height + line + gap)), "white")
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    corners = [((i % across) * block, line + (i // across) * (height + line + gap)) for i in range(len(rows))]
    for left, top in corners[:across]:
        for number, name in enumerate(columns):
            drawing.text((left + number * (width + gap), top - line), name, "black", font)
    for (left, top), caption in zip(corners, rows, strict=True):
        drawing.text((left, top + height), caption, "#555555", font)
    pictures = []
    for frame in range(frames):
        picture = canvas.copy()
        for (left, top), videos in zip(corners, rows.values(), strict=True):
            for number, video in enumerate(videos):
                still = Image.fromarray(video[frame]).resize((width, height), Image.Resampling.BICUBIC)
                picture.paste(still, (left + number * (width + gap), top))
        pictures.append(picture)
    temporary = path.with_name(f".{path.stem}.tmp.webp")
    pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=80, method=6)
    temporary.rename(path)

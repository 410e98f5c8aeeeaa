"""The embedded world: one coloured shape on a dark ground, standing still or crossing the picture.

It is small enough for a CPU and still has what a video model must get right: colour, shape, motion, sharp edges, a
distribution of sizes and paths. `draw` makes a clip from its caption, `judge` reads a clip from its pixels alone, and
`features` / `frechet_distance` compare two sets of clips.

Shape suffixes: T frames, H W picture height and width, N clips, F features. Videos are uint8 `[T, H, W, 3]`.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dmd_ds.errors import UserError

FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 64, 8
FEATURES = 63  # numbers a clip is known by, for the Fréchet distance
BACKGROUND = 32
BRIGHT = 224  # a lit channel; an unlit one stays at the background's 32
COLORS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1),
    "yellow": (1, 1, 0), "magenta": (1, 0, 1), "cyan": (0, 1, 1),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("standing still", "moving sideways", "moving up and down")

SIZE_RANGE = (0.24, 0.36)  # side of the square of equal area, as a fraction of the picture's shorter side
MIDDLE_SPREAD = 0.09  # how far a path runs from the picture's middle, same unit
STILL_SPREAD = 0.18  # how far a standing shape is from the middle, same unit
FEWEST_LIT = 24  # below this contrast (of 192) nothing is found in a clip


@dataclasses.dataclass(frozen=True)
class Caption:
    color: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} {self.motion}"


CAPTIONS = tuple(Caption(*words) for words in itertools.product(COLORS, SHAPES, MOTIONS))

# A Latin square of the three words, never shown to the teacher: it has seen every word, not these nine sentences.
HELD_BACK = tuple(
    Caption(color, SHAPES[i % 3], MOTIONS[(i + i // 3) % 3]) for i, color in enumerate(itertools.islice(itertools.cycle(COLORS), 9))
)


def parse(text: str) -> Caption:
    """The caption whose text this is; `ValueError` for any other text."""
    for caption in CAPTIONS:
        if str(caption) == text:
            return caption
    raise ValueError(f"{text!r} is no caption of the moving shapes; they read like {str(CAPTIONS[0])!r}")


def are_captions(texts: Iterable[str]) -> bool:
    """Whether all of them are captions of this world."""
    return set(texts) <= set(map(str, CAPTIONS))


# ---- drawing ----------------------------------------------------------------------------------------------------------


def _coverage_THW(shape: str, side: float, centre_T2: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1, from its signed distance in pixels (negative inside).

    `side` is the side of the square of equal area; `centre_T2` holds (x, y) of the shape's centre of mass.
    """
    y_H1, x_1W = np.mgrid[0:height, 0:1][0] + 0.5, np.mgrid[0:1, 0:width][1] + 0.5
    dx = x_1W - centre_T2[:, 0, None, None]
    dy = y_H1 - centre_T2[:, 1, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - side / np.sqrt(np.pi)
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - side / 2
    else:  # equilateral, point up: three half planes at the inradius from the centre of mass
        inradius = side / np.sqrt(3 * np.sqrt(3))
        distance = np.maximum(dy, np.sqrt(3) / 2 * abs(dx) - dy / 2) - inradius
    return np.clip(0.5 - distance, 0, 1)


def _reach(shape: str, side: float) -> tuple[float, float, float, float]:
    """How far the shape extends from its centre of mass: left, right, up, down, in pixels."""
    if shape == "circle":
        return (side / np.sqrt(np.pi),) * 4
    if shape == "square":
        return (side / 2,) * 4
    inradius = side / np.sqrt(3 * np.sqrt(3))
    return np.sqrt(3) * inradius, np.sqrt(3) * inradius, 2 * inradius, inradius


def draw(caption: Caption, rng: np.random.Generator, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A clip of the caption, uint8 `[T, H, W, 3]`; size, path and direction come from `rng`."""
    short = min(height, width)
    side = short * rng.uniform(*SIZE_RANGE)
    left, right, up, down = _reach(caption.shape, side)
    low = np.array([left, up]) + 1
    high = np.array([width - right, height - down]) - 1
    middle = np.array([width, height]) / 2
    if caption.motion == "standing still":
        start = end = middle + short * rng.uniform(-STILL_SPREAD, STILL_SPREAD, 2)
    else:
        along = 0 if caption.motion == "moving sideways" else 1
        start = middle + short * rng.uniform(-MIDDLE_SPREAD, MIDDLE_SPREAD, 2)
        end = start.copy()
        start[along], end[along] = low[along], high[along]
        if rng.random() < 0.5:
            start, end = end, start
    centre_T2 = np.linspace(start, end, frames).clip(low, high)
    cover_THW1 = _coverage_THW(caption.shape, side, centre_T2, height, width)[..., None]
    lit_3 = BACKGROUND + (BRIGHT - BACKGROUND) * np.array(COLORS[caption.color])
    return np.round(BACKGROUND + cover_THW1 * (lit_3 - BACKGROUND)).astype(np.uint8)


# ---- judging ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a clip shows. `color`, `shape`, `motion` are None where nothing is found.

    `speed` and `size` are fractions of the picture's shorter side (a frame; side of the square of equal area);
    `sharpness` is the gradient a pixel at the edges as a fraction of full contrast, `saturation` is HSV's, in the shape.
    `centre` is the mean (x, y) of the shape's centre of mass, `start` where it is in the first frame, same unit.
    """

    color: str | None
    shape: str | None
    motion: str | None
    speed: float
    size: float
    sharpness: float
    saturation: float
    centre: tuple[float, float]
    start: tuple[float, float]


NOTHING = Verdict(None, None, None, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0), (0.0, 0.0))


def _gradient_THW(contrast_THW: np.ndarray) -> np.ndarray:
    dy = np.diff(contrast_THW, axis=1, append=contrast_THW[:, -1:])
    dx = np.diff(contrast_THW, axis=2, append=contrast_THW[:, :, -1:])
    return np.hypot(dx, dy)


def _track_T2(mass_THW: np.ndarray) -> np.ndarray:
    total_T = mass_THW.sum((1, 2)) + 1e-6
    x_T = (mass_THW.sum(1) * (np.arange(mass_THW.shape[2]) + 0.5)).sum(1) / total_T
    y_T = (mass_THW.sum(2) * (np.arange(mass_THW.shape[1]) + 0.5)).sum(1) / total_T
    return np.stack([x_T, y_T], 1)


def _motion(track_T2: np.ndarray, short: int) -> str | None:
    along_x, along_y = np.ptp(track_T2, axis=0) / short
    if max(along_x, along_y) < 0.12:
        return "standing still"
    if along_x > 2 * along_y:
        return "moving sideways"
    if along_y > 2 * along_x:
        return "moving up and down"
    return None


def _shape(mask_THW: np.ndarray, track_T2: np.ndarray) -> str:
    """The shape which, drawn at the same place and size, overlaps best (intersection over union)."""
    side = np.sqrt(mask_THW.sum((1, 2)).mean())
    overlap = {}
    for shape in SHAPES:
        drawn_THW = _coverage_THW(shape, side, track_T2, *mask_THW.shape[1:]) > 0.5
        overlap[shape] = (drawn_THW & mask_THW).sum() / max(1, (drawn_THW | mask_THW).sum())
    return max(overlap, key=overlap.get)


def judge(video_THW3: np.ndarray) -> Verdict:
    """What the clip shows, from its pixels alone. uint8 `[T, H, W, 3]` of any size."""
    short = min(video_THW3.shape[1:3])
    lit_THW3 = video_THW3.astype(np.float32) - BACKGROUND
    contrast_THW = abs(lit_THW3).max(-1)
    peak = np.percentile(contrast_THW, 99)
    mask_THW = contrast_THW > peak / 2
    if peak < FEWEST_LIT or not mask_THW.any(axis=(1, 2)).all():
        return NOTHING

    tint_3 = lit_THW3[mask_THW].mean(0)
    likeness = {name: tint_3 @ np.array(lit) / np.sqrt(sum(lit)) for name, lit in COLORS.items()}
    track_T2 = _track_T2(mask_THW.astype(np.float32))
    gradient_THW = _gradient_THW(contrast_THW)
    inside = video_THW3[mask_THW].astype(np.float32)
    return Verdict(
        color=max(likeness, key=likeness.get),
        shape=_shape(mask_THW, track_T2),
        motion=_motion(track_T2, short),
        speed=float(np.linalg.norm(np.diff(track_T2, axis=0), axis=1).mean() / short),
        size=float(np.sqrt(mask_THW.sum((1, 2)).mean()) / short),
        sharpness=float((gradient_THW**2).sum() / (gradient_THW.sum() + 1e-6) / (BRIGHT - BACKGROUND)),
        saturation=float(((inside.max(-1) - inside.min(-1)) / np.maximum(inside.max(-1), 1)).mean()),
        centre=tuple(float(c) for c in track_T2.mean(0) / short),
        start=tuple(float(c) for c in track_T2[0] / short),
    )


def score(verdicts: list[Verdict], captions: list[str]) -> dict[str, float]:
    """Share of clips whose colour, shape, motion, and colour and motion together (`both`) are as asked for, and the
    means of speed (of the clips asked to move), sharpness and saturation."""
    asked = [parse(caption) for caption in captions]
    right = {
        word: np.array([getattr(v, word) == getattr(a, word) for v, a in zip(verdicts, asked, strict=True)])
        for word in ("color", "shape", "motion")
    }
    moving = [v.speed for v, a in zip(verdicts, asked, strict=True) if a.motion != "standing still"]
    return {
        **{word: float(hits.mean()) for word, hits in right.items()},
        "both": float((right["color"] & right["motion"]).mean()),
        "speed": float(np.mean(moving)) if moving else 0.0,
        "sharpness": float(np.mean([v.sharpness for v in verdicts])),
        "saturation": float(np.mean([v.saturation for v in verdicts])),
    }


def diversity(verdicts: list[Verdict], captions: list[str]) -> dict[str, float]:
    """How different the clips of one caption are from each other: standard deviations within a caption, pooled over all captions
    with two clips or more, as fractions of the shorter side.

    `size_spread` is that of the shape's size; `path_spread` of where its path lies: its distance from an edge across the
    direction asked for, or, standing still, its place along both; `start_spread` of where a moving one starts along it.
    Clips in which nothing is found count in none; 0 where there is nothing to pool.
    """
    clips: dict[str, list[Verdict]] = {}
    for verdict, caption in zip(verdicts, captions, strict=True):
        if verdict != NOTHING:
            clips.setdefault(caption, []).append(verdict)
    groups: dict[str, list[np.ndarray]] = {"size": [], "path": [], "start": []}
    for caption, alike in clips.items():
        motion = parse(caption).motion
        centres_N2, starts_N2 = np.array([v.centre for v in alike]), np.array([v.start for v in alike])
        groups["size"].append(np.array([v.size for v in alike]))
        if motion == "standing still":
            groups["path"] += [centres_N2[:, 0], centres_N2[:, 1]]
        else:
            along = 0 if motion == "moving sideways" else 1
            groups["path"].append(centres_N2[:, 1 - along])
            groups["start"].append(starts_N2[:, along])
    return {f"{name}_spread": _pooled_deviation(samples) for name, samples in groups.items()}


def _pooled_deviation(groups: list[np.ndarray]) -> float:
    """The standard deviation about each group's own mean; unbiased in the variance."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


# ---- the Fréchet distance ---------------------------------------------------------------------------------------------


def features(video_THW3: np.ndarray) -> np.ndarray:
    """`FEATURES` numbers a clip: colour, place, edges, change and saturation in its first, middle and last third.

    Each group is scaled so that its variance over real clips is about 1 (measured on 540), so none drowns the others.
    """
    height, width = video_THW3.shape[1:3]
    picture = video_THW3.astype(np.float32) / 255
    contrast_THW = abs(picture - BACKGROUND / 255).max(-1)
    gradient_THW = _gradient_THW(contrast_THW)
    change_THW = abs(np.diff(contrast_THW, axis=0))
    chroma_THW = picture.max(-1) - picture.min(-1)
    row_bins = np.linspace(0, height, 7).astype(int)[:-1]
    column_bins = np.linspace(0, width, 7).astype(int)[:-1]
    numbers = []
    for part in range(3):
        cut = slice(len(picture) * part // 3, len(picture) * (part + 1) // 3)
        moved_THW = change_THW[cut] if len(change_THW[cut]) else np.zeros_like(contrast_THW[:1])
        across_W = contrast_THW[cut].mean((0, 1))
        down_H = contrast_THW[cut].mean((0, 2))
        numbers += [
            9.3 * picture[cut].mean((0, 1, 2)),
            3.5 * np.add.reduceat(across_W, column_bins) / np.diff([*column_bins, width]),
            3.5 * np.add.reduceat(down_H, row_bins) / np.diff([*row_bins, height]),
            [170.0 * gradient_THW[cut].mean(), 57.0 * np.sqrt((gradient_THW[cut] ** 2).mean())],
            [32.0 * moved_THW.mean(), 9.5 * np.sqrt((moved_THW**2).mean())],
            [36.0 * chroma_THW[cut].mean(), 14.0 * np.percentile(chroma_THW[cut], 95)],
        ]
    return np.concatenate(numbers).astype(np.float64)


def read_features(path: Path) -> np.ndarray:
    """Those `[N, F]` of a kept set; `UserError` for a file that holds none."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}") from error
    table = found.get("features")
    if table is None or table.ndim != 2 or table.shape[1] != FEATURES or len(table) < 2 or not np.isfinite(table).all():
        shape = "nothing" if table is None else f"{table.dtype} {list(table.shape)}"
        raise UserError(f"{path}: features is {shape}; of a kept set it is {FEATURES} finite numbers a video, of 2 videos at least")
    return table.astype(np.float64)


def frechet_distance(features_NF: np.ndarray, reference_NF: np.ndarray) -> float:
    """Fréchet distance of two sets, each taken as a Gaussian: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    `[N, F]` each, N may differ (Heusel et al. 2017, with the features above in place of a network's).
    """
    mean_1, mean_2 = features_NF.mean(0), reference_NF.mean(0)
    covariance_1, covariance_2 = np.cov(features_NF, rowvar=False), np.cov(reference_NF, rowvar=False)
    eigenvalues, vectors = np.linalg.eigh(covariance_1)
    root_1 = vectors * np.sqrt(eigenvalues.clip(0)) @ vectors.T
    # tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2): the square roots of a symmetric matrix's eigenvalues
    inner = np.linalg.eigvalsh(root_1 @ covariance_2 @ root_1)
    trace = np.trace(covariance_1) + np.trace(covariance_2) - 2 * np.sqrt(inner.clip(0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + trace)

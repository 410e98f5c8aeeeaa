"""How far what a generator makes has drifted from the teacher's videos of the same prompts and seeds, in numbers that need no
judge: saturation, contrast, motion and the statistics of the latents.

Shape suffixes: C channels, T frames or latent frames, H W height and width.
"""

import dataclasses

import numpy as np
import torch

LOOKS = ("saturation", "contrast", "motion")
LEAST = 0.1 / 255  # a look below a tenth of a level is taken for that: a still teacher's motion is noise


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of a video, or means over a set of them. The looks are fractions of full scale, the channels' are in units of latents."""

    saturation: float  # HSV's, over all pixels
    contrast: float  # standard deviation of a frame's pixels about its mean, in grey
    motion: float  # mean absolute difference of a pixel to the frame before
    latent_mean_C: tuple[float, ...]
    latent_std_C: tuple[float, ...]


def measure(video_THW3: np.ndarray, latents_CTHW: torch.Tensor) -> Measures:
    """Of a uint8 video and the latents it was decoded from."""
    picture = torch.from_numpy(video_THW3).float() / 255
    brightest, darkest = picture.amax(-1), picture.amin(-1)
    grey_THW = picture @ torch.tensor([0.299, 0.587, 0.114])
    latents_CN = latents_CTHW.float().cpu().flatten(1)
    return Measures(
        saturation=float(((brightest - darkest) / brightest.clamp_min(1 / 255)).mean()),
        contrast=float(grey_THW.std((1, 2), unbiased=False).mean()),
        motion=float(picture.diff(dim=0).abs().mean()) if len(picture) > 1 else 0.0,
        latent_mean_C=tuple(latents_CN.mean(1).tolist()),
        latent_std_C=tuple(latents_CN.std(1, unbiased=False).tolist()),
    )


def mean_of(measures: list[Measures]) -> Measures:
    columns = {field.name: np.mean([getattr(m, field.name) for m in measures], axis=0).tolist() for field in dataclasses.fields(Measures)}
    return Measures(**{name: tuple(column) if isinstance(column, list) else column for name, column in columns.items()})


def deviations(found: Measures, teacher: Measures) -> dict[str, float]:
    """How far off each measure is, as a share of the teacher's; the looks with a sign, + is more than the teacher's.

    `latent_mean` is the channels' mean shift in units of the teacher's deviation, `latent_std` the mean share by which theirs differs.
    """
    off = {}
    for look in LOOKS:
        ours, theirs = getattr(found, look), getattr(teacher, look)
        off[look] = (ours - theirs) / max(theirs, LEAST)
    means, stds = np.array(found.latent_mean_C), np.array(found.latent_std_C)
    teacher_means, teacher_stds = np.array(teacher.latent_mean_C), np.array(teacher.latent_std_C)
    off["latent_mean"] = float((abs(means - teacher_means) / teacher_stds).mean())
    off["latent_std"] = float((abs(stds - teacher_stds) / teacher_stds).mean())
    return off


def drift(off: dict[str, float]) -> float:
    """The largest of the deviations, without its sign."""
    return max(map(abs, off.values()))


def outside(off: dict[str, float], band: float) -> dict[str, float]:
    """Those further off than the band is wide."""
    return {name: share for name, share in off.items() if abs(share) > band}

"""Noise levels that training looks at, beside those of the generator's own schedule."""

import torch

from dmd_ds import flow
from dmd_ds.recipe import Score
from dmd_ds.sampler import Schedule


def score_sigmas(uniform_B: torch.Tensor, score: Score, lowest: float = 0.0) -> torch.Tensor:
    """Noise levels for the scores: uniform numbers, shifted, from `lowest` up, kept within the recipe's range."""
    lowest_uniform = flow.shift_sigma(lowest, 1 / score.shift)  # which the shift moves to `lowest`
    return flow.shift_sigma(lowest_uniform + (1 - lowest_uniform) * uniform_B, score.shift).clamp(score.sigma_min, score.sigma_max)


def even_levels(steps: int, shift: float) -> torch.Tensor:
    """Of a teacher's path, `[steps + 1]`, falling from 1 to 0: even ones, moved towards 1 by `shift`."""
    return flow.shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def path_levels(schedule: Schedule, steps: int, shift: float) -> torch.Tensor:
    """Of a teacher's path that passes by the generator's levels: these, and the even ones below their first."""
    even = even_levels(steps, shift)
    return torch.cat([even[even < schedule.sigmas[0]], schedule.sigmas]).unique().flip(0)


def halved_levels(schedule: Schedule) -> torch.Tensor:
    """The generator's levels `[2 K + 1]` with the middle between any two of them."""
    sigmas = schedule.sigmas
    halves = torch.stack([sigmas[:-1], (sigmas[:-1] + sigmas[1:]) / 2], dim=1).flatten()
    return torch.cat([halves, sigmas[-1:]])

"""How the generator's input is made in training: by itself (backward simulation, Yin et al. 2024, 4.5), or from data.

Both end at an exit step k of the generator's schedule: they give its x0 `[B, C, T, H, W]` there, with gradient as
`velocity_at_exit` has it. `noise(k)` is the noise that leads to step k.
"""

from collections.abc import Callable

import torch

from dmd_ds.flow import add_noise, x0_from_velocity
from dmd_ds.sampler import Schedule, Velocity, few_step_x0


def rollout(
    velocity: Velocity, velocity_at_exit: Velocity, noise: Callable[[int], torch.Tensor], schedule: Schedule, exit_step: int
) -> torch.Tensor:
    """From what the generator makes itself in the steps before, which `velocity` drives without gradient."""

    steps = iter(range(exit_step + 1))

    def switched(x, sigma_B):
        if next(steps) == exit_step:
            return velocity_at_exit(x, sigma_B)
        with torch.no_grad():
            return velocity(x, sigma_B)

    return few_step_x0(switched, noise, schedule, exit_step)


def noised_data(
    latents_BCTHW: torch.Tensor,
    velocity_at_exit: Velocity,
    noise: Callable[[int], torch.Tensor],
    schedule: Schedule,
    exit_step: int,
) -> torch.Tensor:
    """From the dataset's latents, noised to the exit step's level."""
    levels = schedule.told[exit_step], schedule.sigmas[exit_step]
    told_B, sigma_B = (level.to(latents_BCTHW.device).expand(len(latents_BCTHW)) for level in levels)
    x = add_noise(latents_BCTHW, noise(exit_step), sigma_B)
    return x0_from_velocity(x, velocity_at_exit(x, told_B), sigma_B)

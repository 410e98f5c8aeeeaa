"""Backward simulation: the generator's training input is what it makes itself in the steps before (Yin et al. 2024, 4.5)."""

import torch

from dmd_ds.randomness import Randomness
from dmd_ds.sampler import Schedule, Velocity, few_step_x0


def rollout(
    velocity: Velocity,
    velocity_at_exit: Velocity,
    schedule: Schedule,
    exit_step: int,
    randomness: Randomness,
    purpose: str,
    step: int,
    samples: list[int],
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """The generator's x0 `[B, C, T, H, W]` at the exit step of its schedule.

    `velocity` drives the steps before, without gradient; `velocity_at_exit` the exit step, as the caller set gradients.
    `samples` are global sample indices, `shape` is `[C, T, H, W]`.
    """

    def noise(k: int) -> torch.Tensor:
        return randomness.normal(f"{purpose}/rollout{k}", step, samples, shape, device)

    steps = iter(range(exit_step + 1))

    def switched(x, sigma_B):
        if next(steps) == exit_step:
            return velocity_at_exit(x, sigma_B)
        with torch.no_grad():
            return velocity(x, sigma_B)

    return few_step_x0(switched, noise, schedule, exit_step)

"""Samplers: the few-step one, on which a generator is trained, validated and used, and the teacher's.

The few-step sampler re-noises: at each noise level of the grid the model's x0 is taken and noised afresh to the next. Grid
and step are those of diffusers' FlowMatchEulerDiscreteScheduler with `stochastic_sampling`, so a stock WanPipeline samples
the student exactly as it was trained. Shape suffixes: B batch, C channels, T latent frames, H W latent size, K steps.
"""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from dmd_ds.flow import add_noise, x0_from_velocity
from dmd_ds.recipe import Sampling

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, T, H, W], sigma [B]) -> velocity


def few_step_scheduler(sampling: Sampling) -> FlowMatchEulerDiscreteScheduler:
    """The stock scheduler that is shipped with a student and defines the grid of its training."""
    return FlowMatchEulerDiscreteScheduler(
        shift=sampling.shift,
        shift_terminal=sampling.last_sigma if sampling.steps > 1 else None,
        stochastic_sampling=True,
    )


def few_step_sigmas(sampling: Sampling) -> torch.Tensor:
    """The grid `[K + 1]`, falling from 1 to `last_sigma` and then 0."""
    scheduler = few_step_scheduler(sampling)
    scheduler.set_timesteps(sampling.steps)
    return scheduler.sigmas


def few_step_x0(velocity: Velocity, noise: Callable[[int], torch.Tensor], sigmas: torch.Tensor, last_step: int) -> torch.Tensor:
    """The model's x0 `[B, C, T, H, W]` at step `last_step` of the grid, reached from pure noise.

    `noise(k)` gives the noise that leads to step k. With `last_step` = K - 1 this is a finished sample; with an earlier one
    it is what the generator is trained on (backward simulation, Yin et al. 2024, section 4.5).
    """
    x = noise(0)
    for k in range(last_step + 1):
        sigma_B = sigmas[k].expand(len(x)).to(x.device)
        x0 = x0_from_velocity(x, velocity(x, sigma_B), sigma_B)
        if k < last_step:
            x = add_noise(x0, noise(k + 1), sigmas[k + 1].expand(len(x)).to(x.device))
    return x0


def guided(velocity_conditional: Velocity, velocity_unconditional: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance, u + w (c - u) (Ho and Salimans 2022; w = 1 is the conditional model alone)."""

    def velocity(x, sigma_B):
        conditional = velocity_conditional(x, sigma_B)
        if guidance == 1.0:
            return conditional
        unconditional = velocity_unconditional(x, sigma_B)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


def scheduler_sample(velocity: Velocity, scheduler: SchedulerMixin, steps: int, noise: torch.Tensor) -> torch.Tensor:
    """A sample by a stock deterministic scheduler (the teacher's UniPC): `[B, C, T, H, W]`."""
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for timestep in scheduler.timesteps:
        sigma_B = (timestep.float() / 1000.0).expand(len(x))
        x = scheduler.step(velocity(x, sigma_B), timestep, x, return_dict=False)[0]
    return x

"""Samplers: the few-step one, on which a generator is trained, validated and used, and the teacher's.

The few-step sampler takes the model's x0 at each of K noise levels and goes to the next by noising it afresh (SDE) or along
the velocity (ODE). Grids are those of stock diffusers schedulers, and so is the step, so a stock WanPipeline samples the
student exactly as it was trained; where no stock scheduler can, `nearest_stock` says what comes nearest. Shape suffixes:
B batch, C channels, T latent frames, H W latent size, K steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from dmd_ds.errors import UserError
from dmd_ds.flow import add_noise, per_sample, x0_from_velocity
from dmd_ds.recipe import Sampling

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, T, H, W], sigma [B]) -> velocity

SHIFTS = tuple(0.1 * i for i in range(1, 301))  # that are tried for the nearest stretched grid


@dataclasses.dataclass(frozen=True)
class Schedule:
    sigmas: torch.Tensor  # [K + 1], falling, the last one 0
    told: torch.Tensor  # [K], what the model is told of them: the same, or cut to whole timesteps
    solver: Literal["sde", "ode"]

    @property
    def steps(self) -> int:
        return len(self.told)


def few_step_scheduler(sampling: Sampling) -> SchedulerMixin:
    """The stock scheduler that defines a grid; it samples as trained where `nearest_stock` is the sampling itself."""
    assert sampling.timesteps is None
    if sampling.grid == "wan":  # diffusers' UniPC has other levels; this solver has Wan's and is Euler's at order 1
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sampling.shift, solver_order=1
        )
    return FlowMatchEulerDiscreteScheduler(
        shift=sampling.shift,
        shift_terminal=sampling.last_sigma if sampling.steps > 1 else None,
        stochastic_sampling=sampling.solver == "sde",
    )


def few_step_schedule(sampling: Sampling) -> Schedule:
    """The noise levels that a recipe or a student's settings ask for."""
    if sampling.timesteps is not None:
        told = torch.tensor(sampling.timesteps) / 1000.0
        return Schedule(torch.cat([told, torch.zeros(1)]), told, sampling.solver)
    scheduler = few_step_scheduler(sampling)
    scheduler.set_timesteps(sampling.steps)
    told = scheduler.sigmas[:-1] if scheduler.timesteps.is_floating_point() else scheduler.timesteps / 1000.0
    return Schedule(scheduler.sigmas, told, sampling.solver)


def with_steps(sampling: Sampling, steps: int) -> Sampling:
    """The same kind of sampling in another number of steps.

    A grid is made anew. A list of timesteps, with 0 at its end, is a curve that is cut into even parts: half of the steps
    are every second timestep. `UserError` where a student of one step knows no level for more.
    """
    if steps == sampling.steps:
        return sampling
    if sampling.timesteps is not None and steps > 0:
        curve = torch.tensor([*sampling.timesteps, 0.0], dtype=torch.float64)
        places = torch.arange(steps, dtype=torch.float64) * sampling.steps / steps
        above, part = places.long(), places.frac()
        timesteps = ((1 - part) * curve[above] + part * curve[above + 1]).tolist()
        return Sampling.model_validate({**sampling.model_dump(), "steps": steps, "timesteps": timesteps})
    if sampling.steps == 1 and sampling.grid == "stretched" and sampling.last_sigma is None:
        raise UserError(f"steps={steps}: the student was trained at 1 step and without last_sigma, which the grid of more steps takes")
    return Sampling.model_validate({**sampling.model_dump(), "steps": steps})


def timesteps_apart(one: Sampling, other: Sampling) -> float:
    """The largest difference of two samplings of as many steps, in timesteps."""
    a, b = few_step_schedule(one), few_step_schedule(other)
    return 1000 * float(torch.maximum((a.sigmas[:-1] - b.sigmas[:-1]).abs(), (a.told - b.told).abs()).max())


def nearest_stock(sampling: Sampling) -> Sampling:
    """What a stock scheduler can do and comes nearest to this sampling: itself, or some stretched grid with the same solver."""
    if sampling.timesteps is None and (sampling.grid == "stretched" or sampling.solver == "ode" or sampling.steps == 1):
        return sampling  # one step draws nothing, so the solver does not matter
    last_sigma = float(few_step_schedule(sampling).sigmas[-2]) if sampling.steps > 1 else None
    changes = {"grid": "stretched", "last_sigma": last_sigma, "timesteps": None}
    stretched = [sampling.model_copy(update={**changes, "shift": shift}) for shift in (sampling.shift, 1.0, *SHIFTS)]
    return min(stretched, key=lambda other: round(timesteps_apart(sampling, other), 3))  # of those as near, with the shift it has


def few_step_x0(velocity: Velocity, noise: Callable[[int], torch.Tensor], schedule: Schedule, last_step: int) -> torch.Tensor:
    """The model's x0 `[B, C, T, H, W]` at step `last_step`, reached from pure noise.

    `noise(k)` gives the noise that leads to step k; the ODE asks for that of step 0 alone. With `last_step` = K - 1 this is a
    finished sample; with an earlier one it is what the generator is trained on (backward simulation, Yin et al. 2024,
    section 4.5).
    """
    x = noise(0)
    for k in range(last_step + 1):
        told_B, sigma_B, next_B = (level.to(x.device).expand(len(x)) for level in (schedule.told[k], *schedule.sigmas[k : k + 2]))
        v = velocity(x, told_B)
        x0 = x0_from_velocity(x, v, sigma_B)
        if k < last_step and schedule.solver == "sde":
            x = add_noise(x0, noise(k + 1), next_B)
        elif k < last_step:
            x = x + per_sample(next_B - sigma_B, x) * v
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

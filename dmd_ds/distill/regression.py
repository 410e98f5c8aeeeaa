"""Step distillation by regression: the generator learns where the guided teacher's own paths lead.

It is a stage, and the warm-up before DMD2: of distribution matching alone, a generator of one or two steps may settle on a part
of what the teacher makes. From a point of a path, at one of the noise levels that it knows, the generator's x0 is to be

    end           where the teacher's path ends (the regression loss of DMD, Yin et al. 2024, eq. 9)
    half_step     what makes its step to its next level that of two steps of the teacher, each half as long (progressive
                  distillation, Salimans and Ho 2022)
    consistency   its own x0 a step of the teacher's further on, where it gets no gradient (consistency distillation, Song et
                  al. 2023); the points are the dataset's latents, noised

The teacher is a model with its frozen base, which an adapter may lie over; its paths are made as they are needed, and nothing
is kept.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width, K steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import deepspeed
import torch

from dmd_ds import flow
from dmd_ds.distill.batch import Batch, Metrics, step_engine
from dmd_ds.distill.levels import even_levels, halved_levels, path_levels
from dmd_ds.distill.losses import regression_loss
from dmd_ds.distill.stage import GENERATOR, Stage, Turn
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.sampler import Velocity, few_step_schedule, guided
from dmd_ds.wan.discriminator import ScoreModel


def teacher_path(velocity: Velocity, noise_BCTHW: torch.Tensor, levels: torch.Tensor, wanted: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(where the path from this noise is at the `wanted` level, where it ends), `[B, C, T, H, W]` each.

    By the second-order method of Adams and Bashforth over `levels`, of which the wanted one is one.
    """
    x, at_wanted, before, step_before = noise_BCTHW, None, None, None
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        if float(sigma) == wanted:
            at_wanted = x
        v = velocity(x, sigma.expand(len(x)).to(x.device))
        step = float(following - sigma)
        slope = v if before is None else v + step / (2 * step_before) * (v - before)
        x, before, step_before = x + step * slope, v, step
    assert at_wanted is not None
    return at_wanted, x


def two_halves(velocity: Velocity, noise_BCTHW: torch.Tensor, levels: torch.Tensor, wanted: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(where the path from this noise is at the `wanted` level, the x0 whose step to the generator's next level ends where two of
    Euler's do), `[B, C, T, H, W]` each. Every second of the `levels` is the generator's own."""
    x, first = noise_BCTHW, levels.tolist().index(wanted)
    for number in range(first + 2):
        if number == first:
            at_wanted = x
        sigma, following = levels[number], levels[number + 1]
        x = x + float(following - sigma) * velocity(x, sigma.expand(len(x)).to(x.device))
    mean_velocity = (x - at_wanted) / float(levels[first + 2] - levels[first])
    return at_wanted, at_wanted - wanted * mean_velocity


class Point(NamedTuple):
    """Where the generator stands on a path, and the x0 it is to have there."""

    x_BCTHW: torch.Tensor
    sigma: float
    told: float  # what the generator is told of sigma
    x0_BCTHW: torch.Tensor


class Regression(Stage):
    """One update of the generator a step, on the paths of its batches' noise and prompts."""

    def __init__(
        self,
        recipe: Recipe,
        generator: deepspeed.DeepSpeedEngine,
        teacher: ScoreModel,
        negative_embeds_1LD: torch.Tensor,
        two_pass_guidance: float,
        device: torch.device,
    ):
        self.recipe, self.generator, self.teacher = recipe, generator, teacher
        self.engines = {GENERATOR: generator}
        self.negative_embeds_1LD, self.two_pass_guidance, self.device = negative_embeds_1LD, two_pass_guidance, device
        settings = recipe.regression
        self.optimizer = recipe.generator.model_copy(update={"lr": settings.lr or recipe.generator.lr})
        self.schedule = few_step_schedule(recipe.sampling)
        self.levels = {
            "end": path_levels(self.schedule, settings.teacher_steps, recipe.score.shift),
            "half_step": halved_levels(self.schedule),
            "consistency": even_levels(settings.teacher_steps, recipe.score.shift),
        }[settings.target]
        self.point = {"end": self.on_whole_path, "half_step": self.on_halved_path, "consistency": self.on_noised_data}[settings.target]
        self.randomness = Randomness(recipe.seed)

    def turns(self, step: int) -> list[Turn]:
        return [Turn(GENERATOR, "regression", self.generator_step)]

    def generator_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        passes = (self.one_pass(batch, step) for batch in batches)
        return step_engine(self.generator, self.optimizer, step, self.recipe.all_generator_updates, GENERATOR, passes)

    def one_pass(self, batch: Batch, step: int) -> Metrics:
        with torch.no_grad():
            point = self.point(batch, step)
        told_B = torch.full((len(batch.samples),), point.told, device=self.device)
        x0_BCTHW = point.x_BCTHW - point.sigma * batch.velocity_of(self.generator)(point.x_BCTHW, told_B)
        loss = regression_loss(x0_BCTHW, point.x0_BCTHW)
        self.generator.backward(loss)
        self.generator.step()
        return {"loss/regression": loss.detach()}

    def teachers_velocity(self, batch: Batch) -> Velocity:
        conditional = batch.real_velocity_of(self.teacher)
        unconditional = batch.real_velocity_of(self.teacher, self.negative_embeds_1LD)
        return guided(conditional, unconditional, self.two_pass_guidance)

    # ---- the targets: what the generator is given is the same level on all ranks --------------------------------------

    def exit_step(self, step: int) -> tuple[float, float]:
        """(sigma, what the generator is told of it) of one of its steps."""
        exit_step = self.randomness.integer("regression/exit_step", step, self.schedule.steps)
        return float(self.schedule.sigmas[exit_step]), float(self.schedule.told[exit_step])

    def noise(self, batch: Batch, step: int) -> torch.Tensor:
        return self.randomness.normal("regression/noise", step, batch.samples, batch.latents_shape, self.device)

    def on_whole_path(self, batch: Batch, step: int) -> Point:
        sigma, told = self.exit_step(step)
        x, end = teacher_path(self.teachers_velocity(batch), self.noise(batch, step), self.levels, sigma)
        return Point(x, sigma, told, end)

    def on_halved_path(self, batch: Batch, step: int) -> Point:
        sigma, told = self.exit_step(step)
        x, x0 = two_halves(self.teachers_velocity(batch), self.noise(batch, step), self.levels, sigma)
        return Point(x, sigma, told, x0)

    def on_noised_data(self, batch: Batch, step: int) -> Point:
        number = self.randomness.integer("regression/point", step, len(self.levels) - 1)
        (sigma, sigma_B), (following, following_B) = (
            (float(level), level.to(self.device).expand(len(batch.samples))) for level in self.levels[number : number + 2]
        )
        x = flow.add_noise(batch.latents_BCTHW, self.noise(batch, step), sigma_B)
        further = x + (following - sigma) * self.teachers_velocity(batch)(x, sigma_B)
        # at the path's end, noise level 0, the generator is the identity
        x0 = flow.x0_from_velocity(further, batch.velocity_of(self.generator.module)(further, following_B), following_B)
        return Point(x, sigma, sigma, x0)

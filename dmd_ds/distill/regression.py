"""A warm-up before DMD2: the generator learns to land where the guided teacher's own path from the same noise ends.

It is the regression loss of DMD (Yin et al. 2024, eq. 9) as a start: of distribution matching alone, a generator of one or two
steps may settle on a part of what the teacher makes. The teacher is the score model without its adapter; its paths are made
as they are needed, and nothing is kept.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width, K steps.
"""

from collections.abc import Sequence

import deepspeed
import torch

from dmd_ds import flow
from dmd_ds.distill.batch import Batch, Metrics, step_engine
from dmd_ds.distill.losses import regression_loss
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.sampler import Schedule, Velocity, guided
from dmd_ds.wan.discriminator import ScoreModel


def path_levels(schedule: Schedule, steps: int, shift: float) -> torch.Tensor:
    """Noise levels of a teacher's path, falling to 0: `steps` even ones, moved towards 1 by `shift`, and those of the generator."""
    even = flow.shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()
    levels = torch.cat([even[even < schedule.sigmas[0]], schedule.sigmas])
    return levels.unique().flip(0)


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


class Regression:
    """One update of the generator a step, on the paths of its batches' noise and prompts."""

    def __init__(
        self,
        recipe: Recipe,
        generator: deepspeed.DeepSpeedEngine,
        score_model: ScoreModel,
        schedule: Schedule,
        negative_embeds_1LD: torch.Tensor,
        two_pass_guidance: float,
        device: torch.device,
    ):
        self.recipe, self.generator, self.score_model, self.schedule = recipe, generator, score_model, schedule
        self.negative_embeds_1LD, self.two_pass_guidance, self.device = negative_embeds_1LD, two_pass_guidance, device
        lr = recipe.regression.lr or recipe.generator.lr
        self.optimizer = recipe.generator.model_copy(update={"lr": lr})
        self.levels = path_levels(schedule, recipe.regression.teacher_steps, recipe.score.shift)
        self.randomness = Randomness(recipe.seed)

    def generator_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        return step_engine(self.generator, self.optimizer, step, "generator", (self.one_pass(batch, step) for batch in batches))

    def one_pass(self, batch: Batch, step: int) -> Metrics:
        exit_step = self.randomness.integer("regression/exit_step", step, self.schedule.steps)
        sigma = float(self.schedule.sigmas[exit_step])
        noise_BCTHW = self.randomness.normal("regression/noise", step, batch.samples, batch.latents_shape, self.device)
        with torch.no_grad():
            conditional = batch.real_velocity_of(self.score_model)
            unconditional = batch.real_velocity_of(self.score_model, self.negative_embeds_1LD)
            x_BCTHW, end_BCTHW = teacher_path(guided(conditional, unconditional, self.two_pass_guidance), noise_BCTHW, self.levels, sigma)
        told_B = self.schedule.told[exit_step].expand(len(x_BCTHW)).to(self.device)
        x0_BCTHW = x_BCTHW - sigma * batch.velocity_of(self.generator)(x_BCTHW, told_B)
        loss = regression_loss(x0_BCTHW, end_BCTHW)
        self.generator.backward(loss)
        self.generator.step()
        return {"loss/regression": loss.detach()}

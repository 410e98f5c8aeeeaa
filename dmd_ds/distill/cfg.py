"""Guidance distillation: a student learns in one pass what its frozen teacher predicts with guidance in two.

The student is the teacher with a guidance embedding, which has no effect at first: it begins as the conditional model. It is
what Meng et al. (2023) do in their first stage, on flow matching's velocity. What comes of it is a start for DMD2, as the
generator and as a real score that takes one pass instead of two; at one fixed guidance it folds into a stock model.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width.
"""

import dataclasses
from collections.abc import Sequence

import deepspeed
import torch

from dmd_ds import flow
from dmd_ds.distill.batch import Batch, Metrics, step_engine
from dmd_ds.distill.levels import even_levels, score_sigmas
from dmd_ds.distill.losses import guided_prediction, pseudo_huber_loss
from dmd_ds.distill.regression import teacher_path
from dmd_ds.distill.stage import GENERATOR, Stage, Turn
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.wan.discriminator import ScoreModel


class CfgDistillation(Stage):
    """`teacher`: the frozen model, whose own guidance embedding has no effect. One update of the generator a step."""

    def __init__(
        self,
        recipe: Recipe,
        generator: deepspeed.DeepSpeedEngine,
        teacher: ScoreModel,
        negative_embeds_1LD: torch.Tensor,
        device: torch.device,
    ):
        self.recipe, self.generator, self.teacher = recipe, generator, teacher
        self.engines = {GENERATOR: generator}
        self.negative_embeds_1LD, self.device = negative_embeds_1LD, device
        self.settings = recipe.cfg_distill
        self.levels = even_levels(self.settings.teacher_steps, recipe.score.shift)
        self.randomness = Randomness(recipe.seed)

    def turns(self, step: int) -> list[Turn]:
        return [Turn(GENERATOR, "guidance distillation", self.generator_step)]

    def generator_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        passes = (self.one_pass(batch, step) for batch in batches)
        return step_engine(self.generator, self.recipe.generator, step, self.recipe.all_generator_updates, GENERATOR, passes)

    def one_pass(self, batch: Batch, step: int) -> Metrics:
        lowest, highest = self.settings.guidance_min, self.settings.guidance_max
        guidance_B = lowest + (highest - lowest) * self.randomness.uniform("cfg_distill/guidance", step, batch.samples, self.device)
        batch = dataclasses.replace(batch, guidance_B=guidance_B)
        with torch.no_grad():
            x_BCTHW, sigma_B = self.noised_data(batch, step) if self.settings.input == "data" else self.on_teachers_path(batch, step)
            target_BCTHW = self.guided_velocity(batch, x_BCTHW, sigma_B)
        velocity_BCTHW = batch.velocity_of(self.generator)(x_BCTHW, sigma_B)
        loss = pseudo_huber_loss(velocity_BCTHW, target_BCTHW, self.settings.huber_c)
        self.generator.backward(loss)
        self.generator.step()
        return {"loss/cfg_distill": loss.detach()}

    def guided_velocity(self, batch: Batch, x_BCTHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """The teacher's, at each sample's own guidance: conditional and unconditional go through it as one batch."""
        conditions = batch.conditions(2)
        conditions["prompt_embeds_BLD"][len(x_BCTHW) :] = self.negative_embeds_1LD
        velocity = self.teacher(x_BCTHW.repeat(2, 1, 1, 1, 1), sigma_B.repeat(2), **conditions).velocity_BCTHW
        return guided_prediction(*velocity.chunk(2), batch.guidance_B)

    # ---- what student and teacher are shown: latents and their noise levels -------------------------------------------

    def noised_data(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        uniform_B = self.randomness.uniform("cfg_distill/sigma", step, batch.samples, self.device)
        sigma_B = score_sigmas(uniform_B, self.recipe.score)
        return flow.add_noise(batch.latents_BCTHW, self.noise(batch, step), sigma_B), sigma_B

    def on_teachers_path(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the guided teacher itself comes by from pure noise, at each sample's own guidance; the level is the same on all ranks,
        which go as many steps."""
        sigma_1 = score_sigmas(self.randomness.uniform("cfg_distill/sigma", step, [0]), self.recipe.score)
        levels = torch.cat([self.levels[self.levels > sigma_1], sigma_1])
        x_BCTHW = self.noise(batch, step)
        if len(levels) > 1:
            x_BCTHW = teacher_path(lambda x, sigma_B: self.guided_velocity(batch, x, sigma_B), x_BCTHW, levels, float(levels[0]))[1]
        return x_BCTHW, sigma_1.to(self.device).expand(len(x_BCTHW))

    def noise(self, batch: Batch, step: int) -> torch.Tensor:
        return self.randomness.normal("cfg_distill/noise", step, batch.samples, batch.latents_shape, self.device)

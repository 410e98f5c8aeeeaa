"""The DMD2 engine: a generator and a fake score that take turns, each in its own DeepSpeed ZeRO-3 engine.

Between the two engines only plain tensors pass. The score side turns the generator's x0 into one tensor dL/dx0 on a detached
leaf, and the generator's engine back-propagates that tensor. Real and fake score are one module: a frozen base with a LoRA
adapter; the adapter's weight, an argument of each call, says which of the two a sample sees.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width.
"""

import dataclasses

import deepspeed
import torch

from dmd_ds import flow
from dmd_ds.distill.losses import (
    distribution_matching_gradient,
    distribution_matching_loss,
    flow_matching_loss,
    guided_x0,
)
from dmd_ds.distill.rollout import rollout
from dmd_ds.parallel.engine import set_lr
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe, Score
from dmd_ds.sampler import Velocity, few_step_schedule
from dmd_ds.wan.denoiser import ImageCondition


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step is computed on. `samples` are the places of these samples in the global batch: they key every draw."""

    samples: list[int]
    prompt_embeds_BLD: torch.Tensor
    latents_shape: tuple[int, int, int, int]  # [C, T, H, W]
    image: ImageCondition | None  # what an image-to-video model is shown
    guidance_B: torch.Tensor | None  # what a guidance-embedded model is asked for

    def velocity_of(self, model: torch.nn.Module) -> Velocity:
        """The model's velocity under this batch's conditions."""
        return lambda x, sigma_B: model(x, sigma_B, self.prompt_embeds_BLD, guidance_B=self.guidance_B, image=self.image)


def score_sigmas(uniform_B: torch.Tensor, score: Score, lowest: float = 0.0) -> torch.Tensor:
    """Noise levels for the scores: uniform numbers, shifted, from `lowest` up, kept within the recipe's range."""
    lowest_uniform = flow.shift_sigma(lowest, 1 / score.shift)  # which the shift moves to `lowest`
    return flow.shift_sigma(lowest_uniform + (1 - lowest_uniform) * uniform_B, score.shift).clamp(score.sigma_min, score.sigma_max)


def x0_of_scores(
    score_model: torch.nn.Module,
    x_BCTHW: torch.Tensor,
    sigma_B: torch.Tensor,
    batch: Batch,
    negative_embeds_1LD: torch.Tensor,
    guidance: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Real (guided) and fake x0 of the same noised latents, `[B, C, T, H, W]` each.

    Fake, real conditional and real unconditional go through the base as one batch, so each of its layers is gathered once.
    Guidance pushes away from the negative text; the image all of them see. At guidance 1 the unconditional pass is left out.
    """
    embeds = [batch.prompt_embeds_BLD, batch.prompt_embeds_BLD]
    if guidance != 1.0:
        embeds.append(negative_embeds_1LD.expand(len(x_BCTHW), -1, -1))
    parts = len(embeds)
    adapter_weight = torch.zeros(parts, len(x_BCTHW), device=x_BCTHW.device)
    adapter_weight[0] = 1.0
    x, sigma = x_BCTHW.repeat(parts, 1, 1, 1, 1), sigma_B.repeat(parts)
    image = batch.image.repeat(parts) if batch.image else None
    guidance_B = None if batch.guidance_B is None else batch.guidance_B.repeat(parts)
    velocity = score_model(x, sigma, torch.cat(embeds), adapter_weight.flatten(), guidance_B=guidance_B, image=image)
    fake, real, *unconditional = flow.x0_from_velocity(x, velocity, sigma).chunk(parts)
    return (guided_x0(real, unconditional[0], guidance) if unconditional else real), fake


class DMD2Engine:
    """Coordinates the two engines. `negative_embeds_1LD` is the text that guidance pushes away from.

    `two_pass_guidance`: how far it pushes; 1 where the real score has its guidance from an embedding, in one pass.
    """

    def __init__(
        self,
        recipe: Recipe,
        generator: deepspeed.DeepSpeedEngine,
        fake_score: deepspeed.DeepSpeedEngine,
        negative_embeds_1LD: torch.Tensor,
        two_pass_guidance: float,
        device: torch.device,
    ):
        self.recipe = recipe
        self.generator = generator
        self.fake_score = fake_score
        self.negative_embeds_1LD = negative_embeds_1LD.to(device)
        self.two_pass_guidance = two_pass_guidance
        self.device = device
        self.randomness = Randomness(recipe.seed)
        self.schedule = few_step_schedule(recipe.sampling)

    def exit_step(self, step: int, purpose: str) -> int:
        """The step of the rollout whose x0 is trained on, the same on all ranks."""
        if self.recipe.rollout.exit == "last":
            return self.schedule.steps - 1
        return self.randomness.integer(f"{purpose}/exit_step", step, self.schedule.steps)

    def rollout(self, batch: Batch, step: int, purpose: str, velocity_at_exit) -> torch.Tensor:
        """The generator's x0 at an exit step that is the same on all ranks, with gradient as `velocity_at_exit` has it."""
        return rollout(
            velocity=batch.velocity_of(self.generator.module),
            velocity_at_exit=velocity_at_exit,
            schedule=self.schedule,
            exit_step=self.exit_step(step, purpose),
            randomness=self.randomness,
            purpose=purpose,
            step=step,
            samples=batch.samples,
            shape=batch.latents_shape,
            device=self.device,
        )

    def noised(self, x0_BCTHW: torch.Tensor, batch: Batch, step: int, purpose: str):
        """The samples at a random noise level: (noised latents, noise, sigma)."""
        noise = self.randomness.normal(f"{purpose}/score_noise", step, batch.samples, batch.latents_shape, self.device)
        uniform_B = self.randomness.uniform(f"{purpose}/score_sigma", step, batch.samples, self.device)
        lowest = float(self.schedule.sigmas[self.exit_step(step, purpose) + 1]) if self.recipe.score.above_exit else 0.0
        sigma_B = score_sigmas(uniform_B, self.recipe.score, lowest)
        return flow.add_noise(x0_BCTHW, noise, sigma_B), noise, sigma_B

    def generator_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """One update of the generator by the distribution-matching gradient."""
        self.generator.train()
        x0_BCTHW = self.rollout(batch, step, "generator", batch.velocity_of(self.generator))
        with torch.no_grad():
            leaf_BCTHW = x0_BCTHW.detach()
            x_BCTHW, _, sigma_B = self.noised(leaf_BCTHW, batch, step, "generator")
            real, fake = x0_of_scores(self.fake_score.module, x_BCTHW, sigma_B, batch, self.negative_embeds_1LD, self.two_pass_guidance)
            loss, dloss_dx0 = distribution_matching_loss(distribution_matching_gradient(leaf_BCTHW, real, fake))
        self.generator.backward((x0_BCTHW * dloss_dx0).sum())  # the derivative of this scalar is dL/dx0 itself
        set_lr(self.generator, self.recipe.generator, step // self.recipe.fake_score.updates_per_generator_update)
        self.generator.step()
        return {"loss/dm": loss, "grad_norm/generator": self.generator.get_global_grad_norm()}

    def fake_score_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """One update of the fake score: denoise what the generator makes now."""
        with torch.no_grad():
            x0_BCTHW = self.rollout(batch, step, "fake_score", batch.velocity_of(self.generator.module))
            x_BCTHW, noise_BCTHW, sigma_B = self.noised(x0_BCTHW, batch, step, "fake_score")
        velocity_BCTHW = batch.velocity_of(self.fake_score)(x_BCTHW, sigma_B)
        loss = flow_matching_loss(velocity_BCTHW, x0_BCTHW, noise_BCTHW)
        self.fake_score.backward(loss)
        set_lr(self.fake_score, self.recipe.fake_score, step)
        self.fake_score.step()
        return {"loss/fake_score": loss.detach(), "grad_norm/fake_score": self.fake_score.get_global_grad_norm()}

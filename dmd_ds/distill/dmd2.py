"""The DMD2 engine: a generator and a fake score that take turns, each in its own DeepSpeed ZeRO-3 engine.

Between the two engines only plain tensors pass. The score side turns the generator's x0 into one tensor dL/dx0 on a detached
leaf, and the generator's engine back-propagates that tensor. Real and fake score are one module: a frozen base with a LoRA
adapter; the adapter's weight, an argument of each call, says which of the two a sample sees. A GAN head on the features of
the fake score is part of the same module.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width.
"""

from collections.abc import Callable, Sequence

import deepspeed
import torch

from dmd_ds import flow
from dmd_ds.distill import losses
from dmd_ds.distill.batch import Batch, Metrics, step_engine
from dmd_ds.distill.levels import score_sigmas
from dmd_ds.distill.losses import flow_matching_loss, guided_prediction
from dmd_ds.distill.regression import Regression
from dmd_ds.distill.rollout import noised_data, rollout
from dmd_ds.distill.stage import FAKE_SCORE, GENERATOR, Stage, Turn
from dmd_ds.parallel.engine import hold_weights, let_weights_go
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.sampler import Velocity, few_step_schedule
from dmd_ds.wan.discriminator import ScoreModel


def x0_of_scores(
    score_model: ScoreModel,
    x_BCTHW: torch.Tensor,
    sigma_B: torch.Tensor,
    batch: Batch,
    negative_embeds_1LD: torch.Tensor,
    guidance: float,
    guidance_below: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Real (guided) and fake x0 of the same noised latents, `[B, C, T, H, W]` each.

    Fake, real conditional and real unconditional go through the base as one batch, so each of its layers is gathered once.
    Guidance pushes away from the negative text; the image all of them see. At guidance 1 the unconditional pass is left out.
    Samples noised beyond `guidance_below` are not guided (a limited interval, Kynkäänniemi et al. 2024): it narrows layouts.
    """
    parts = 2 if guidance == 1.0 else 3
    conditions = batch.conditions(parts)
    if parts == 3:
        conditions["prompt_embeds_BLD"][-len(x_BCTHW) :] = negative_embeds_1LD
    adapter_weight = torch.zeros(parts, len(x_BCTHW), device=x_BCTHW.device)
    adapter_weight[0] = 1.0
    x, sigma = x_BCTHW.repeat(parts, 1, 1, 1, 1), sigma_B.repeat(parts)
    velocity = score_model(x, sigma, adapter_weight_B=adapter_weight.flatten(), **conditions).velocity_BCTHW
    fake, real, *unconditional = flow.x0_from_velocity(x, velocity, sigma).chunk(parts)
    if unconditional:
        real = guided_prediction(real, unconditional[0], torch.where(sigma_B <= guidance_below, guidance, 1.0))
    return real, fake


class DMD2Engine(Stage):
    """Coordinates the two engines. `negative_embeds_1LD` is the text that guidance pushes away from.

    `two_pass_guidance`: how far it pushes; 1 where the real score has its guidance from an embedding, in one pass.
    A step takes the backward passes of all `batches` that it is given and updates one of the engines once.
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
        self.engines = {GENERATOR: generator, FAKE_SCORE: fake_score}
        self.generator = generator
        self.fake_score = fake_score
        self.negative_embeds_1LD = negative_embeds_1LD
        self.two_pass_guidance = two_pass_guidance
        self.device = device
        self.randomness = Randomness(recipe.seed)
        self.schedule = few_step_schedule(recipe.sampling)
        self.warm_up = Regression(recipe, generator, fake_score.module, negative_embeds_1LD, two_pass_guidance, device)

    def turns(self, step: int) -> list[Turn]:
        """The generator when it is due, then the fake score; in the warm-up the generator alone."""
        if step < self.recipe.regression.steps:
            return self.warm_up.turns(step)
        fake_score = Turn(FAKE_SCORE, "fake score", self.fake_score_step)
        return [Turn(GENERATOR, "generator", self.generator_step), fake_score] if self.recipe.is_generator_due(step) else [fake_score]

    def exit_step(self, step: int, purpose: str) -> int:
        """The step of the rollout whose x0 is trained on, the same on all ranks."""
        if self.recipe.rollout.exit == "last":
            return self.schedule.steps - 1
        return self.randomness.integer(f"{purpose}/exit_step", step, self.schedule.steps)

    # ---- what the generator makes -------------------------------------------------------------------------------------

    def generated(self, batch: Batch, step: int, purpose: str, velocity_at_exit: Velocity) -> torch.Tensor:
        """The generator's x0 at an exit step that is the same on all ranks, with gradient as `velocity_at_exit` has it."""
        exit_step = self.exit_step(step, purpose)

        def noise(k: int) -> torch.Tensor:
            return self.randomness.normal(f"{purpose}/rollout{k}", step, batch.samples, batch.latents_shape, self.device)

        def last_velocity(x_BCTHW, sigma_B):
            let_weights_go(self.generator.module)
            self.hold_for_backward(self.generator)
            return velocity_at_exit(x_BCTHW, sigma_B)

        if self.recipe.rollout.input == "data":
            return noised_data(batch.latents_BCTHW, last_velocity, noise, self.schedule, exit_step)
        if self.recipe.parallel.gather != "each":
            hold_weights(self.generator.module)
        return rollout(batch.velocity_of(self.generator.module), last_velocity, noise, self.schedule, exit_step)

    def hold_for_backward(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Before a forward: where the recipe says so, its weights stay whole until `backward`."""
        if self.recipe.parallel.gather == "update" and torch.is_grad_enabled():
            hold_weights(engine.module)

    def backward(self, engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
        let_weights_go(engine.module)
        engine.backward(loss)
        engine.step()

    def noised(self, x0_BCTHW: torch.Tensor, batch: Batch, step: int, purpose: str):
        """The samples at a noise level that the scores look at: (noised latents, noise, sigma)."""
        noise = self.randomness.normal(f"{purpose}/score_noise", step, batch.samples, batch.latents_shape, self.device)
        uniform_B = self.randomness.uniform(f"{purpose}/score_sigma", step, batch.samples, self.device)
        lowest = float(self.schedule.sigmas[self.exit_step(step, purpose) + 1]) if self.recipe.score.above_exit else 0.0
        sigma_B = score_sigmas(uniform_B, self.recipe.score, lowest)
        return flow.add_noise(x0_BCTHW, noise, sigma_B), noise, sigma_B

    def gan_noise(self, batch: Batch, step: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise, sigma) at which the discriminator looks at samples, generated and real alike."""
        gan = self.recipe.gan
        uniform_B = self.randomness.uniform(f"{purpose}/gan_sigma", step, batch.samples, self.device)
        noise = self.randomness.normal(f"{purpose}/gan_noise", step, batch.samples, batch.latents_shape, self.device)
        return noise, gan.sigma_min + (gan.sigma_max - gan.sigma_min) * uniform_B

    # ---- the generator's turn -----------------------------------------------------------------------------------------

    def generator_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        """One update of the generator, by the distribution-matching gradient and, where there is a GAN, the discriminator's."""
        passes = (self.generator_pass(batch, step) for batch in batches)
        update, updates = self.recipe.generator_updates(step), self.recipe.all_generator_updates
        return step_engine(self.generator, self.recipe.generator, update, updates, GENERATOR, passes)

    def generator_pass(self, batch: Batch, step: int) -> Metrics:
        x0_BCTHW = self.generated(batch, step, "generator", batch.velocity_of(self.generator))
        leaf_BCTHW = x0_BCTHW.detach()
        loss, dloss_dx0 = self.distribution_matching(leaf_BCTHW, batch, step)
        metrics = {"loss/dm": loss}
        if self.recipe.gan.is_on:
            gan_loss, dgan_dx0 = self.gan_for_generator(leaf_BCTHW, batch, step)
            metrics |= {"loss/gan_generator": gan_loss}
            dloss_dx0 = dloss_dx0 + self.recipe.gan.generator_weight * dgan_dx0
        self.backward(self.generator, (x0_BCTHW * dloss_dx0).sum())  # the derivative of this scalar is dL/dx0 itself
        return metrics

    @torch.no_grad()
    def distribution_matching(self, x0_BCTHW: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and dL/dx0."""
        x_BCTHW, _, sigma_B = self.noised(x0_BCTHW, batch, step, "generator")
        guidance = self.two_pass_guidance, self.recipe.score.guidance_below
        real, fake = x0_of_scores(self.fake_score.module, x_BCTHW, sigma_B, batch, self.negative_embeds_1LD, *guidance)
        if self.recipe.score.normaliser:
            return losses.distribution_matching_loss(losses.distribution_matching_gradient(x0_BCTHW, real, fake))
        return losses.distribution_matching_loss(losses.score_difference(real, fake))

    def gan_for_generator(self, x0_BCTHW: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and dL/dx0, through the fake score's features; its own weights get no gradient of this."""
        leaf_BCTHW = x0_BCTHW.detach().requires_grad_()
        noise, sigma_B = self.gan_noise(batch, step, "generator")
        x_BCTHW = flow.add_noise(leaf_BCTHW, noise, sigma_B)
        marks = self.fake_score.module(x_BCTHW, sigma_B, judged=len(x_BCTHW), **batch.conditions(1)).marks_JM
        loss = losses.generator_gan_loss(marks)
        return loss.detach(), torch.autograd.grad(loss, leaf_BCTHW)[0]

    # ---- the fake score's turn ----------------------------------------------------------------------------------------

    def fake_score_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        """One update of the fake score: denoise what the generator makes now, and tell it from the dataset's."""
        one_pass: Callable[[Batch, int], Metrics] = self.score_and_gan_pass if self.recipe.gan.is_on else self.score_pass
        passes = (one_pass(batch, step) for batch in batches)
        warm_up = self.recipe.regression.steps
        return step_engine(
            self.fake_score, self.recipe.fake_score, step - warm_up, self.recipe.max_steps - warm_up, FAKE_SCORE, passes
        )

    def score_pass(self, batch: Batch, step: int) -> Metrics:
        with torch.no_grad():
            x0_BCTHW = self.generated(batch, step, "fake_score", batch.velocity_of(self.generator.module))
            x_BCTHW, noise_BCTHW, sigma_B = self.noised(x0_BCTHW, batch, step, "fake_score")
        self.hold_for_backward(self.fake_score)
        velocity_BCTHW = self.fake_score(x_BCTHW, sigma_B, **batch.conditions(1)).velocity_BCTHW
        loss = flow_matching_loss(velocity_BCTHW, x0_BCTHW, noise_BCTHW)
        self.backward(self.fake_score, loss)
        return {"loss/fake_score": loss.detach()}

    def score_and_gan_pass(self, batch: Batch, step: int) -> Metrics:
        """Samples to denoise, generated, real and disturbed real ones to judge, in this order: one batch, one backward pass."""
        gan = self.recipe.gan
        with torch.no_grad():
            x0_BCTHW = self.generated(batch, step, "fake_score", batch.velocity_of(self.generator.module))
            x_BCTHW, noise_BCTHW, sigma_B = self.noised(x0_BCTHW, batch, step, "fake_score")
            judged = [x0_BCTHW, batch.latents_BCTHW]
            if gan.r1_weight:
                disturbance = self.randomness.normal("fake_score/r1", step, batch.samples, batch.latents_shape, self.device)
                judged.append(batch.latents_BCTHW + gan.r1_strength * disturbance)
            gan_noise, gan_sigma_B = self.gan_noise(batch, step, "fake_score")
            x_all = torch.cat([x_BCTHW, *(flow.add_noise(x0, gan_noise, gan_sigma_B) for x0 in judged)])
            sigma_all = torch.cat([sigma_B, gan_sigma_B.repeat(len(judged))])
        self.hold_for_backward(self.fake_score)
        scores = self.fake_score(x_all, sigma_all, judged=len(judged) * len(x_BCTHW), **batch.conditions(1 + len(judged)))
        score_loss = flow_matching_loss(scores.velocity_BCTHW[: len(x_BCTHW)], x0_BCTHW, noise_BCTHW)
        fake_marks, real_marks, *disturbed_marks = scores.marks_JM.chunk(len(judged))
        gan_loss = losses.discriminator_loss(real_marks, fake_marks)
        loss = score_loss + gan.discriminator_weight * gan_loss
        metrics = {"loss/fake_score": score_loss.detach(), "loss/gan_discriminator": gan_loss.detach()}
        if disturbed_marks:
            r1 = losses.approximate_r1(real_marks, disturbed_marks[0], gan.r1_strength)
            loss = loss + gan.r1_weight * r1
            metrics |= {"loss/r1": r1.detach()}
        self.backward(self.fake_score, loss)
        return metrics

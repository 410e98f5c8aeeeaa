"""Reward post-training of a few-step generator: what it makes is judged, and the judgement's gradient flows back into it.

It is DRaFT (Clark et al. 2023) by the generator's own few-step sampler, with a gradient through its last steps alone. An adapter
is trained; the model without it is where it starts from, and a penalty on how far it goes from there keeps what the reward does
not look at. Sample and start are one batch, in which the adapter weighs 1 and 0.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width.
"""

from collections.abc import Mapping, Sequence

import deepspeed
import torch
from diffusers import AutoencoderKLWan

from dmd_ds.distill.batch import Batch, Metrics, step_engine
from dmd_ds.distill.losses import velocity_difference
from dmd_ds.distill.stage import GENERATOR, Stage, Turn
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.rewards import Reward, check_scores
from dmd_ds.sampler import few_step_schedule, few_step_x0
from dmd_ds.wan.autoencoder import decode_frames


class RewardTraining(Stage):
    """`rewards`: the functions of `recipe.reward.rewards`. One update of the generator's adapter a step."""

    def __init__(
        self,
        recipe: Recipe,
        generator: deepspeed.DeepSpeedEngine,
        vae: AutoencoderKLWan,
        rewards: Mapping[str, Reward],
        device: torch.device,
    ):
        self.recipe, self.generator, self.vae, self.rewards, self.device = recipe, generator, vae, rewards, device
        self.engines = {GENERATOR: generator}
        self.settings = recipe.reward
        self.schedule = few_step_schedule(recipe.sampling)
        self.randomness = Randomness(recipe.seed)

    def turns(self, step: int) -> list[Turn]:
        return [Turn(GENERATOR, "reward", self.generator_step)]

    def generator_step(self, batches: Sequence[Batch], step: int) -> Metrics:
        passes = (self.one_pass(batch, step) for batch in batches)
        return step_engine(self.generator, self.recipe.generator, step, self.recipe.all_generator_updates, GENERATOR, passes)

    def one_pass(self, batch: Batch, step: int) -> Metrics:
        x0_BCTHW, penalty = self.generated(batch, step)
        frames_BT3HW = decode_frames(self.vae, x0_BCTHW, None if self.settings.frames == "all" else self.settings.frames)
        count = len(batch.samples)
        scores = {name: check_scores(name, reward(frames_BT3HW, batch.prompts), count).mean() for name, reward in self.rewards.items()}
        reward = sum(self.settings.rewards[name].weight * score for name, score in scores.items())
        loss = self.settings.penalty * penalty - reward
        self.generator.backward(loss)
        self.generator.step()
        numbers = {"loss/reward": loss, "reward/all": reward, "reward/penalty": penalty}
        numbers |= {f"reward/{name}": score for name, score in scores.items()}
        return {name: number.detach() for name, number in numbers.items()}

    def generated(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(a finished sample's x0 `[B, C, T, H, W]`, with a gradient through the last steps; how far these are from the start's)."""
        steps, differences = iter(range(self.schedule.steps)), []
        weights_2B = torch.cat([torch.ones(len(batch.samples)), torch.zeros(len(batch.samples))]).to(self.device)

        def noise(k: int) -> torch.Tensor:
            return self.randomness.normal(f"reward/rollout{k}", step, batch.samples, batch.latents_shape, self.device)

        def velocity(x_BCTHW: torch.Tensor, told_B: torch.Tensor) -> torch.Tensor:
            if next(steps) < self.schedule.steps - self.settings.steps:
                with torch.no_grad():
                    return batch.velocity_of(self.generator.module)(x_BCTHW, told_B)
            both = self.generator(
                x_BCTHW.repeat(2, 1, 1, 1, 1), told_B.repeat(2), adapter_weight_B=weights_2B, **batch.conditions(2)
            )
            velocity_BCTHW, start_BCTHW = both.chunk(2)
            differences.append(velocity_difference(velocity_BCTHW, start_BCTHW.detach()))
            return velocity_BCTHW

        x0_BCTHW = few_step_x0(velocity, noise, self.schedule, self.schedule.steps - 1)
        return x0_BCTHW, torch.stack(differences).mean()

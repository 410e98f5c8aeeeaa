"""What one step of an algorithm is computed on, and the step of one engine over its backward passes.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, L tokens, D text width.
"""

import dataclasses
from collections.abc import Iterable

import deepspeed
import torch

from dmd_ds.parallel.engine import set_lr
from dmd_ds.recipe import Optimizer
from dmd_ds.sampler import Velocity
from dmd_ds.wan.denoiser import ImageCondition
from dmd_ds.wan.discriminator import ScoreModel

Metrics = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one backward pass is computed on. `samples` are the places of these samples in the global batch: they key every draw."""

    samples: list[int]
    prompts: list[str]
    prompt_embeds_BLD: torch.Tensor
    latents_shape: tuple[int, int, int, int]  # [C, T, H, W]
    latents_BCTHW: torch.Tensor | None  # the dataset's own, where training looks at them
    image: ImageCondition | None  # what an image-to-video model is shown
    guidance_B: torch.Tensor | None  # what a guidance-embedded model is asked for

    def velocity_of(self, model: torch.nn.Module) -> Velocity:
        """The generator's velocity under this batch's conditions."""
        return lambda x, sigma_B: model(x, sigma_B, self.prompt_embeds_BLD, guidance_B=self.guidance_B, image=self.image)

    def start_velocity_of(self, model: torch.nn.Module) -> Velocity:
        """That of a generator without the adapter that it trains."""
        none_B = torch.zeros(len(self.samples), device=self.prompt_embeds_BLD.device)
        return lambda x, sigma_B: model(x, sigma_B, self.prompt_embeds_BLD, none_B, self.guidance_B, self.image)

    def conditions(self, times: int) -> dict[str, torch.Tensor | ImageCondition | None]:
        """The arguments of a score model that is shown this batch's samples so many times over, under their own prompts."""
        return {
            "prompt_embeds_BLD": self.prompt_embeds_BLD.repeat(times, 1, 1),
            "guidance_B": None if self.guidance_B is None else self.guidance_B.repeat(times),
            "image": self.image.repeat(times) if self.image else None,
        }

    def real_velocity_of(self, score_model: ScoreModel, text_1LD: torch.Tensor | None = None) -> Velocity:
        """The velocity of a score model's frozen base, under these samples' prompts or one other text."""
        embeds_BLD = self.prompt_embeds_BLD if text_1LD is None else text_1LD.expand(len(self.samples), -1, -1)
        none_B = torch.zeros(len(self.samples), device=embeds_BLD.device)
        return lambda x, sigma_B: score_model(x, sigma_B, embeds_BLD, none_B, self.guidance_B, self.image).velocity_BCTHW


def step_engine(
    engine: deepspeed.DeepSpeedEngine, optimizer: Optimizer, update: int, updates: int, name: str, passes: Iterable[Metrics]
) -> Metrics:
    """The engine's `update`-th optimiser step of all `updates`, which the last of the `passes` takes; their numbers, averaged, and the
    gradient norm."""
    set_lr(engine, optimizer, update, updates)
    done = list(passes)
    numbers = {key: sum(metrics[key] for metrics in done) / len(done) for key in done[0]}
    return numbers | {f"grad_norm/{name}": engine.get_global_grad_norm()}

"""One DMD2 iteration of the trainer, a generator update and k of the fake score's, against the same passes in plain PyTorch.

The floor has the same model and kernels, checkpointing and optimisers, and nothing around them: no DeepSpeed and so no part to
gather or reduce, no hooks, no random draws kept by sample, no log. Both take turns in one process on one rank, so what slows the
machine slows both. On accelerators a job over all of them says beside it what of their peak it reaches (bench.utilisation).
"""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from dmd_ds.bench import utilisation
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, recipe_of, trainer_of, written
from dmd_ds.distill.dmd2 import DMD2Engine
from dmd_ds.parallel.engine import training_dtype
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel, Recipe
from dmd_ds.stopping import Stopping
from dmd_ds.trainer import Trainer
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.discriminator import ScoreModel
from dmd_ds.wan.text import padded_tokens
from dmd_ds.wan.weights import whole_transformer


class Floor:
    """The two models, unsharded, and their optimisers."""

    def __init__(self, world: World, recipe: Recipe, dmd2: DMD2Engine, device: torch.device):
        self.recipe, self.dmd2, self.device = recipe, dmd2, device
        generator, base = (whole_transformer(Path(recipe.model.path), training_dtype()) for _ in range(2))
        self.generator = WanDenoiser(generator, activation_checkpointing=True).to(device).requires_grad_(True)
        self.score = ScoreModel(base, activation_checkpointing=True)
        self.score.add_adapter(recipe.fake_score.lora_rank, recipe.fake_score.lora_alpha)
        self.score.weigh_adapter()
        self.score.to(device)
        self.optimizers = [
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=section.lr, betas=section.betas)
            for model, section in ((self.generator, recipe.generator), (self.score, recipe.fake_score))
        ]
        shape = (world.batch, *world.latents_shape)
        self.latents = lambda: torch.randn(shape, device=device)
        self.text = torch.randn(world.batch, padded_tokens(world.text, training_dtype()), world.model.text_dim, device=device)
        self.sigmas = dmd2.schedule.sigmas.to(device)

    def rollout(self, exit_step: int) -> torch.Tensor:
        x, before = self.latents(), torch.is_grad_enabled()
        for k in range(exit_step + 1):
            sigma = self.sigmas[k]
            with torch.set_grad_enabled(before and k == exit_step):
                x0 = x - sigma * self.generator(x, sigma.expand(len(x)), self.text)
            if k < exit_step:
                x = (1 - self.sigmas[k + 1]) * x0 + self.sigmas[k + 1] * self.latents()
        return x0

    def update(self, which: int, model: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def generator_step(self, exit_step: int) -> None:
        x0 = self.rollout(exit_step)
        with torch.no_grad():
            x = (0.5 * x0 + 0.5 * self.latents()).repeat(3, 1, 1, 1, 1)
            weight = torch.tensor([1.0, 0.0, 0.0], device=self.device).repeat_interleave(len(x0))
            scores = self.score(x, torch.full((len(x),), 0.5, device=self.device), self.text.repeat(3, 1, 1), weight).velocity_BCTHW
            fake, real, unconditional = (x - 0.5 * scores).chunk(3)
            real = unconditional + self.recipe.score.guidance * (real - unconditional)
            gradient = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        self.update(0, self.generator, (x0 * gradient).mean())

    def fake_score_step(self, exit_step: int) -> None:
        with torch.no_grad():
            x0 = self.rollout(exit_step)
            noise = self.latents()
            x = 0.5 * x0 + 0.5 * noise
        velocity = self.score(x, torch.full((len(x),), 0.5, device=self.device), self.text).velocity_BCTHW
        self.update(1, self.score, (velocity - (noise - x0)).pow(2).mean())

    def iteration(self, first: int) -> None:
        """The steps from `first` on, with the exit steps that the trainer draws for them."""
        self.generator_step(self.dmd2.exit_step(first, "generator"))
        for step in range(first, first + self.recipe.fake_score.updates_per_generator_update):
            self.fake_score_step(self.dmd2.exit_step(step, "fake_score"))


def trainer_iteration(trainer: Trainer, stopping: Stopping, first: int) -> None:
    """All that a step of a run does: batch, update, means over ranks, log."""
    for step in range(first, first + trainer.recipe.fake_score.updates_per_generator_update):
        metrics, batches = trainer.step(step)
        trainer.after(step + 1, metrics, batches, stopping)


def seconds(function: Callable[[int], None], first: int) -> float:
    gc.collect()
    get_accelerator().synchronize()
    began = time.perf_counter()
    function(first)
    get_accelerator().synchronize()
    return time.perf_counter() - began


def on_rank(world: dict, folder: str, repeats: int) -> dict[str, list[float]]:
    world = World(**world)
    with joined(Parallel()) as mesh:
        recipe = recipe_of(world, folder, save_every=10**6)
        trainer = trainer_of(world, recipe, mesh)
        floor = Floor(world, recipe, trainer.stage, mesh.device)
        k = recipe.fake_score.updates_per_generator_update
        found: dict[str, list[float]] = {"trainer": [], "floor": []}
        with Stopping(trainer.run, None, True) as stopping:
            for number in range(repeats + 2):  # two to warm up: DeepSpeed learns the order of the modules
                ways = [("trainer", lambda first: trainer_iteration(trainer, stopping, first)), ("floor", floor.iteration)]
                for name, function in ways if number % 2 else reversed(ways):
                    taken = seconds(function, number * k)
                    if number >= 2:
                        found[name].append(taken)
        trainer.monitor.close()
    return found


def measure(world: World, repeats: int) -> dict[str, Any]:
    accelerator = get_accelerator()
    with written(world) as folder:
        found = run_ranks("step", 1, world=world.__dict__, folder=folder, repeats=repeats)
        if accelerator.device_name() != "cpu":
            found["utilisation"] = run_ranks("utilisation", accelerator.device_count(), world=world.__dict__, folder=folder)
    return found


def table(found: dict[str, Any]) -> str:
    """Medians and quartiles of seconds, and of the ratio within each pair."""
    ratios = [a / b for a, b in zip(found["trainer"], found["floor"], strict=True)]
    lines = ["| | median | quarter below | quarter above |", "|---|---|---|---|"]
    for name, values in (("seconds, trainer", found["trainer"]), ("seconds, floor", found["floor"]), ("trainer / floor", ratios)):
        low, _, high = statistics.quantiles(values, n=4)
        lines.append(f"| {name} | {statistics.median(values):.3f} | {low:.3f} | {high:.3f} |")
    if "utilisation" in found:
        lines += utilisation.lines(found["utilisation"])
    return "\n".join(lines)

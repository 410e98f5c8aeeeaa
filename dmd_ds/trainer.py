"""The one loop: batch -> generator step when due -> fake-score step -> log -> validate -> save."""

from pathlib import Path

import torch
import torch.distributed as dist

from dmd_ds import checkpoint
from dmd_ds.build import build_generator, build_score_model
from dmd_ds.data.latents import BatchOrder, SizedOrder, pad_embeds
from dmd_ds.distill.batch import Batch
from dmd_ds.distill.dmd2 import DMD2Engine
from dmd_ds.distill.regression import Regression
from dmd_ds.errors import UserError
from dmd_ds.inputs import Inputs
from dmd_ds.monitor import Monitor
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.ema import ShardedEMA
from dmd_ds.parallel.engine import make_engine, training_dtype
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import dump_recipe
from dmd_ds.validation import Validation
from dmd_ds.wan.image import condition_of
from dmd_ds.wan.text import padded_tokens


class Trainer:
    def __init__(self, inputs: Inputs, mesh: Mesh):
        recipe = self.recipe = inputs.recipe
        self.run = Path(recipe.output_dir)
        self.mesh = mesh
        self.video = inputs.video
        if len(set(self.mesh.all_gather_objects(inputs.first_step))) > 1:
            raise UserError(f"output_dir={recipe.output_dir}: the nodes see different checkpoints there; it must be one folder for all")
        self.dataset = inputs.dataset
        self.prompt_tokens = padded_tokens(self.dataset.most_prompt_tokens, training_dtype())
        global_batch_size = recipe.data.batch_size * self.mesh.data_size * recipe.data.accumulation
        randomness = Randomness(recipe.seed)
        if recipe.data.sizes:
            self.order = SizedOrder(inputs.latents_shapes, len(self.dataset), global_batch_size, randomness)
        else:
            self.order = BatchOrder(self.dataset.buckets(), global_batch_size, randomness)

        sequence = SequenceParallel(self.mesh, training_dtype())
        score_model, generator = build_score_model(inputs, sequence), build_generator(inputs, sequence)
        self.engines = {
            "generator": make_engine(generator, inputs.ds_configs["generator"]),
            "fake_score": make_engine(score_model, inputs.ds_configs["fake_score"]),
        }
        self.ema = ShardedEMA(self.engines["generator"], recipe.generator.ema_decay) if recipe.generator.ema_decay else None
        negative_embeds_1LD = pad_embeds([self.dataset.negative_embeds_LD], self.prompt_tokens)
        self.embedded_guidance = inputs.embedded_guidance
        teacher = {"negative_embeds_1LD": negative_embeds_1LD.to(mesh.device), "two_pass_guidance": inputs.two_pass_guidance}
        self.dmd2 = DMD2Engine(recipe, **self.engines, **teacher, device=mesh.device)
        generator_engine, schedule = self.engines["generator"], self.dmd2.schedule
        self.regression = Regression(recipe, generator_engine, score_model, schedule, **teacher, device=mesh.device)
        self.validation = None
        if recipe.validation.every:
            guidance = inputs.embedded_guidance, inputs.two_pass_guidance
            self.validation = Validation(
                recipe, inputs.model, self.dataset, inputs.video, inputs.shown_shape, self.prompt_tokens, *guidance, self.mesh
            )
        self.first_step = inputs.first_step
        if inputs.resume_from:
            checkpoint.load(inputs.resume_from, self.engines, self.ema, self.mesh)
        if self.mesh.is_first:
            self.run.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(self.run / "recipe.yaml", dump_recipe(recipe))
        if self.validation and recipe.validation.teacher_steps:
            self.validation.meet_teacher(score_model)
        self.best_score = checkpoint.best_score(self.run, recipe)
        self.monitor = Monitor(self.run, self.first_step, recipe.max_steps, writes=self.mesh.is_first)

    def batches(self, step: int) -> list[Batch]:
        """This rank's part of the step's global batch, a batch a backward pass."""
        shape, indices = self.order(step)
        size, ranks = self.recipe.data.batch_size, self.mesh.data_size
        first = [number * size * ranks for number in range(self.recipe.data.accumulation)]
        return [self.batch(shape, indices, [start + place for place in self.mesh.samples(size)]) for start in first]

    def batch(self, shape: tuple[int, ...], indices: list[int], places: list[int]) -> Batch:
        """The samples at these places of a global batch, whose dataset indices are given."""
        mine = [indices[place] for place in places]
        device = self.mesh.device
        embeds_BLD = pad_embeds([self.dataset.prompt_embeds(index) for index in mine], self.prompt_tokens)
        latents_BCTHW = None
        if self.recipe.uses_latents:
            latents_BCTHW = torch.stack([self.dataset.latents(index) for index in mine]).to(device, torch.float32)
        guidance_B = None
        if self.embedded_guidance is not None:
            guidance_B = torch.full((len(mine),), self.embedded_guidance, device=device)
        return Batch(places, embeds_BLD.to(device), shape, latents_BCTHW, condition_of(self.dataset, mine, device), guidance_B)

    def train(self) -> None:
        for step in range(self.first_step, self.recipe.max_steps):
            batches = self.batches(step)
            if step < self.recipe.regression.steps:
                metrics = self.regression.generator_step(batches, step)
                self.average()
            else:
                metrics = {}
                if self.recipe.is_generator_due(step):
                    metrics |= self.dmd2.generator_step(batches, step)
                    self.average()
                metrics |= self.dmd2.fake_score_step(batches, step)
            self.after(step + 1, metrics)
        self.monitor.close()

    def average(self) -> None:
        if self.ema:
            self.ema.update()

    def after(self, step: int, metrics: dict[str, torch.Tensor | float]) -> None:
        """Validates, logs and saves, after `step` steps."""
        last = step == self.recipe.max_steps
        numbers, score, is_best = self.mean_over_ranks(metrics), None, False
        if self.validation and (last or step % self.recipe.validation.every == 0):
            look = self.validation.look(self.engines["generator"].module, self.ema, self.run / "samples" / f"step_{step:06d}")
            numbers, score = numbers | look.numbers, look.score
            is_best = score is not None and (self.best_score is None or score < self.best_score)
            for warning in look.warnings:
                self.monitor.warn(step, warning)
        self.monitor.log(step, numbers)
        if is_best:
            self.best_score = score
        if last or is_best or step % self.recipe.save_every == 0:
            checkpoint.save(self.run, step, self.engines, self.ema, self.recipe, self.video, score, is_best, self.mesh)

    def mean_over_ranks(self, metrics: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Means of the ranks' numbers, with one collective and one synchronisation."""
        numbers = torch.stack([torch.as_tensor(value, device=self.mesh.device).float() for value in metrics.values()])
        dist.all_reduce(numbers)
        return dict(zip(metrics, (numbers / self.mesh.world_size).tolist(), strict=True))

"""The one loop: batch -> the turns of the stage -> log -> validate -> save."""

from pathlib import Path

import torch
import torch.distributed as dist

from dmd_ds import checkpoint
from dmd_ds.build import build_stage
from dmd_ds.data.latents import BatchOrder, SizedOrder, pad_embeds
from dmd_ds.distill.batch import Batch, Metrics
from dmd_ds.distill.stage import GENERATOR
from dmd_ds.errors import UserError
from dmd_ds.faults import SkippedUpdates
from dmd_ds.inputs import Inputs
from dmd_ds.monitor import Monitor
from dmd_ds.parallel.ema import ShardedEMA
from dmd_ds.parallel.engine import training_dtype
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.parallel.state import EngineState
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import dump_recipe
from dmd_ds.start import write_start
from dmd_ds.stopping import Stopping
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
        if self.mesh.is_first:
            self.run.mkdir(parents=True, exist_ok=True)
        write_start(inputs, self.prompt_tokens, mesh)
        global_batch_size = recipe.global_batch_size(self.mesh.world_size)
        randomness = Randomness(recipe.seed)
        if recipe.data.sizes:
            self.order = SizedOrder(inputs.latents_shapes, len(self.dataset), global_batch_size, randomness)
        else:
            self.order = BatchOrder(self.dataset.buckets(), global_batch_size, randomness)

        self.embedded_guidance = inputs.embedded_guidance
        negative_embeds_1LD = pad_embeds([self.dataset.negative_embeds_LD], self.prompt_tokens)
        self.stage, teacher = build_stage(inputs, mesh, negative_embeds_1LD.to(mesh.device))
        generator = self.stage.engines[GENERATOR]
        self.ema = ShardedEMA(generator, recipe.generator.ema_decay) if recipe.generator.ema_decay else None
        self.validation = None
        if recipe.validation.every:
            guidance = inputs.embedded_guidance, inputs.two_pass_guidance
            self.validation = Validation(
                recipe, inputs.model, self.dataset, inputs.video, inputs.shown_shape, self.prompt_tokens, *guidance, self.mesh
            )
        self.first_step = inputs.first_step
        states = {name: EngineState(engine) for name, engine in self.stage.engines.items()}
        states |= {checkpoint.EMA: self.ema} if self.ema else {}
        self.checkpoints = checkpoint.Checkpoints(self.run, recipe, states, inputs.video, self.mesh)
        if inputs.resume_from:
            self.checkpoints.load(inputs.resume_from)
        if self.mesh.is_first:
            checkpoint.write_whole(self.run / "recipe.yaml", dump_recipe(recipe))
        if self.validation and recipe.validation.teacher_steps:
            self.validation.meet_teacher(teacher)
        self.best_score = checkpoint.best_score(self.run, recipe)
        self.skipped = SkippedUpdates(self.run, recipe.max_skipped_updates, self.mesh.rank)
        self.monitor = Monitor(self.run, recipe, self.first_step, writes=self.mesh.is_first)

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
        prompts = [self.dataset.about[index]["caption"] for index in mine]
        return Batch(places, prompts, embeds_BLD.to(device), shape, latents_BCTHW, condition_of(self.dataset, mine, device), guidance_B)

    def train(self) -> None:
        """To the last step, or until something asks for an end; then the last checkpoint is whole."""
        with Stopping(self.run, self.recipe.max_hours, self.mesh.is_first) as stopping:
            for step in range(self.first_step, self.recipe.max_steps):
                metrics, batches = self.step(step)
                if self.after(step + 1, metrics, batches, stopping):
                    break
            self.checkpoints.finish()
        self.monitor.close()

    def step(self, step: int) -> tuple[Metrics, list[Batch]]:
        self.mesh.mark(f"step {step + 1}: batch")
        batches = self.batches(step)
        metrics = {}
        for turn in self.stage.turns(step):
            self.mesh.mark(f"step {step + 1}: {turn.name}")
            metrics |= turn.take(batches, step)
            if turn.engine == GENERATOR and self.ema:
                self.ema.update()
        return metrics, batches

    def after(self, step: int, metrics: Metrics, batches: list[Batch], stopping: Stopping) -> bool:
        """Validates, logs and saves, after `step` steps; whether the run ends with it."""
        last = step == self.recipe.max_steps
        asked = stopping.reason
        numbers, stops, written = self.over_ranks(metrics, asked is not None, self.checkpoints.is_written_here)
        score, is_best = None, False
        if warning := self.skipped.look(step, numbers, batches, [batch.prompts for batch in batches]):
            self.monitor.warn(step, warning)
        if written == self.mesh.world_size:
            self.checkpoints.finish()
        if self.validation and (last or step % self.recipe.validation.every == 0):
            self.mesh.mark(f"step {step}: validation")
            look = self.validation.look(self.stage.engines[GENERATOR].module, self.ema, self.run / "samples" / f"step_{step:06d}")
            numbers, score = numbers | look.numbers, look.score
            is_best = score is not None and (self.best_score is None or score < self.best_score)
            for warning in look.warnings:
                self.monitor.warn(step, warning)
        self.monitor.log(step, numbers)
        if is_best:
            self.best_score = score
        if last or stops or is_best or step % self.recipe.save_every == 0:
            self.mesh.mark(f"step {step}: saving")
            self.checkpoints.save(step, score, is_best)
        if stops and not last:
            stopping.heeded()
            self.monitor.say(f"stopped after step {step}, saved: {asked or 'another rank was asked to'}; the same command goes on")
        return bool(stops)

    def over_ranks(self, metrics: Metrics, *flags: bool) -> tuple[dict[str, float], *tuple[int, ...]]:
        """Means of the ranks' numbers, and on how many of them each flag stands: one collective and one synchronisation."""

        def there(value: torch.Tensor | float) -> torch.Tensor:  # of a plain number `full` makes one without a wait, `tensor` with one
            if isinstance(value, torch.Tensor):
                return value.to(self.mesh.device, torch.float32)  # the norm of gradients that are offloaded lies on the host
            return torch.full((), float(value), device=self.mesh.device)

        sums = torch.stack([there(value) for value in (*metrics.values(), *flags)])
        dist.all_reduce(sums)
        *sums, = sums.tolist()
        means = {name: total / self.mesh.world_size for name, total in zip(metrics, sums, strict=False)}
        return means, *map(int, sums[len(metrics) :])

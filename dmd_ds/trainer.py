"""The one loop: batch -> generator step when due -> fake-score step -> log -> validate -> save."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dmd_ds import checkpoint
from dmd_ds.data.latents import BatchOrder, LatentsDataset, pad_embeds
from dmd_ds.distill.dmd2 import Batch, DMD2Engine
from dmd_ds.errors import UserError
from dmd_ds.monitor import Monitor
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.engine import complete_ds_config, gather_by_block, make_engine, read_ds_config, shard, sharded_build, training_dtype
from dmd_ds.parallel.mesh import Mesh, check_degrees, world_size
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Optimizer, Recipe, dump_recipe
from dmd_ds.sampler import few_step_sigmas
from dmd_ds.validation import Validation
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.guidance import add_guidance_embedding, fresh_weights, has_guidance_embedding
from dmd_ds.wan.image import condition_of
from dmd_ds.wan.text import padded_tokens
from dmd_ds.wan.weights import (
    empty_transformer,
    find_model,
    load_weights,
    renew_buffers,
    takes_image,
    transformer_config,
    transformer_tensors,
)

GuidanceEmbedding = Literal["none", "stored", "fresh"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a recipe names on disk, found and checked before any engine is built."""

    recipe: Recipe
    model: Path
    dataset: LatentsDataset
    transformer_config: dict
    guidance_embedding: GuidanceEmbedding
    ds_configs: dict[str, dict]
    resume_from: Path | None
    first_step: int

    @property
    def embedded_guidance(self) -> float | None:
        """What the models are told, where they can be told."""
        return None if self.guidance_embedding == "none" else self.recipe.score.guidance

    @property
    def two_pass_guidance(self) -> float:
        """A fresh embedding tells the real score nothing yet, so its guidance takes two passes still."""
        return 1.0 if self.guidance_embedding == "stored" else self.recipe.score.guidance

    def ranks(self) -> str:
        ulysses, ring = self.recipe.parallel.ulysses, self.recipe.parallel.ring
        a_sample = ulysses * ring
        if a_sample == 1:
            return f"{world_size()} ranks"
        return f"{world_size()} ranks = data {world_size() // a_sample} x ulysses {ulysses} x ring {ring}; data {world_size() // a_sample}"

    def summary(self) -> str:
        config, recipe = self.transformer_config, self.recipe
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.dataset.buckets())
        sigmas = " ".join(f"{sigma:.3f}" for sigma in few_step_sigmas(recipe.sampling))
        return (
            f"model {self.model}: {'image' if takes_image(config) else 'text'} to video, {config['num_layers']} layers, "
            f"{config['num_attention_heads']} heads of {config['attention_head_dim']}"
            f"{'' if self.guidance_embedding == 'none' else f', {self.guidance_embedding} guidance embedding'}\n"
            f"data {self.dataset.folder}: {len(self.dataset)} samples, latents {shapes}\n"
            f"{self.ranks()} x batch {recipe.data.batch_size}; steps {self.first_step} to {recipe.max_steps}, "
            f"a generator update every {recipe.fake_score.updates_per_generator_update}; sigmas {sigmas}"
        )


def check_inputs(recipe: Recipe) -> Inputs:
    """Finds everything the recipe names; `UserError` for what is missing or does not fit together."""
    if recipe.score.sigma_min >= recipe.score.sigma_max:
        raise UserError(f"score.sigma_min={recipe.score.sigma_min} is not below score.sigma_max={recipe.score.sigma_max}")
    model = find_model(recipe.model.path)
    config = transformer_config(model)
    stored = has_guidance_embedding(transformer_tensors(model))
    guidance_embedding = "stored" if stored else "fresh" if recipe.model.guidance_embedding else "none"
    check_degrees(recipe.parallel, config["num_attention_heads"])
    dataset = LatentsDataset(recipe.data.path)
    for shape in dataset.buckets():
        if shape[0] != config["out_channels"]:
            raise UserError(f"data.path={recipe.data.path}: latents of {shape[0]} channels, model.path takes {config['out_channels']}")
        for size, patch in zip(shape[1:], config["patch_size"], strict=True):
            if size % patch:
                patches = config["patch_size"]
                raise UserError(f"data.path={recipe.data.path}: latents {list(shape[1:])} do not divide into patches {patches}")
    text_width = dataset.negative_embeds_LD.shape[1]
    if text_width != config["text_dim"]:
        raise UserError(f"data.path={recipe.data.path}: text of width {text_width}, model.path takes {config['text_dim']}")
    check_images(recipe, dataset, config)
    sections: dict[str, Optimizer] = {"generator": recipe.generator, "fake_score": recipe.fake_score}
    ds_configs = {
        name: complete_ds_config(read_ds_config(f"{name}.ds_config", section.ds_config), section, recipe.data.batch_size)
        for name, section in sections.items()
    }
    resume_from = checkpoint.latest(Path(recipe.output_dir))
    first_step = 0
    if resume_from:
        checkpoint.check_same_recipe(resume_from, recipe)
        first_step = checkpoint.resumed_step(resume_from, world_size())
    return Inputs(recipe, model, dataset, config, guidance_embedding, ds_configs, resume_from, first_step)


def check_images(recipe: Recipe, dataset: LatentsDataset, config: dict) -> None:
    """Images in the data and a model that takes them, or neither."""
    data, model = f"data.path={recipe.data.path}", f"model.path={recipe.model.path}"
    if dataset.image_embeds_shape is None:
        if takes_image(config):
            raise UserError(f"{data}: made for text to video, {model} takes images too; encode the clips with that model")
        return
    if not takes_image(config):
        raise UserError(f"{data}: made for image to video, {model} takes text alone; encode the clips with that model")
    width = dataset.image_embeds_shape[1]
    if width != config["image_dim"]:
        raise UserError(f"{data}: images of width {width}, {model} takes {config['image_dim']}")


def sharded_transformer(model: Path, config: dict, embedding: GuidanceEmbedding, seed: int, ds_config: dict) -> WanTransformer3DModel:
    """The model's transformer, sharded over the ranks and loaded a tensor at a time; `seed`: of a fresh guidance embedding."""

    def build() -> WanTransformer3DModel:
        transformer = empty_transformer(config)
        return transformer if embedding == "none" else add_guidance_embedding(transformer)

    transformer = sharded_build(ds_config, build)
    renew_buffers(transformer)
    shapes = {name: parameter.ds_shape for name, parameter in transformer.named_parameters()}
    load_weights(transformer, model, shard, fresh_weights(shapes, seed) if embedding == "fresh" else {})
    return transformer


def build_denoiser(inputs: Inputs, ds_config: dict, sequence: SequenceParallel) -> WanDenoiser:
    transformer = sharded_transformer(inputs.model, inputs.transformer_config, inputs.guidance_embedding, inputs.recipe.seed, ds_config)
    return WanDenoiser(transformer, sequence, inputs.recipe.activation_checkpointing, inputs.recipe.activation_offload)


def build_generator(inputs: Inputs, sequence: SequenceParallel) -> WanDenoiser:
    """Trained whole, or as an adapter over frozen weights.

    A fresh guidance embedding is trained beside the adapter: frozen it would stay without effect. A stored one is a part of the
    model like any other and is frozen with it.
    """
    recipe = inputs.recipe
    generator = build_denoiser(inputs, inputs.ds_configs["generator"], sequence)
    if recipe.generator.lora_rank is None:
        return gather_by_block(generator, WanTransformerBlock)
    torch.manual_seed(recipe.seed + 1)  # another adapter than the fake score's, alike on all ranks
    generator.add_adapter(recipe.generator.lora_rank, recipe.generator.lora_alpha)
    if inputs.guidance_embedding == "fresh":
        generator.transformer.condition_embedder.guidance_embedder.requires_grad_(True)
    return generator


class Trainer:
    def __init__(self, inputs: Inputs, mesh: Mesh):
        recipe = self.recipe = inputs.recipe
        self.run = Path(recipe.output_dir)
        self.mesh = mesh
        if len(set(self.mesh.all_gather_objects(inputs.first_step))) > 1:
            raise UserError(f"output_dir={recipe.output_dir}: the nodes see different checkpoints there; it must be one folder for all")
        self.dataset = inputs.dataset
        self.prompt_tokens = padded_tokens(self.dataset.most_prompt_tokens, training_dtype())
        global_batch_size = recipe.data.batch_size * self.mesh.data_size
        self.order = BatchOrder(self.dataset.buckets(), global_batch_size, Randomness(recipe.seed))

        sequence = SequenceParallel(self.mesh, training_dtype())
        score_model = build_denoiser(inputs, inputs.ds_configs["fake_score"], sequence)
        torch.manual_seed(recipe.seed)  # the adapter's first weights, alike on all ranks
        score_model.add_adapter(recipe.fake_score.lora_rank, recipe.fake_score.lora_alpha)
        score_model.weigh_adapter()
        generator = build_generator(inputs, sequence)
        self.engines = {
            "generator": make_engine(generator, inputs.ds_configs["generator"]),
            "fake_score": make_engine(score_model, inputs.ds_configs["fake_score"]),
        }
        negative_embeds_1LD = pad_embeds([self.dataset.negative_embeds_LD], self.prompt_tokens)
        self.embedded_guidance = inputs.embedded_guidance
        self.dmd2 = DMD2Engine(
            recipe,
            **self.engines,
            negative_embeds_1LD=negative_embeds_1LD,
            two_pass_guidance=inputs.two_pass_guidance,
            device=self.mesh.device,
        )
        self.validation = None
        if recipe.validation.every:
            self.validation = Validation(recipe, inputs.model, self.dataset, self.prompt_tokens, inputs.embedded_guidance, self.mesh)
        self.first_step = inputs.first_step
        if inputs.resume_from:
            checkpoint.load(inputs.resume_from, self.engines)
        if self.mesh.is_first:
            self.run.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(self.run / "recipe.yaml", dump_recipe(recipe))
        self.monitor = Monitor(self.run, self.first_step, recipe.max_steps, writes=self.mesh.is_first)

    def batch(self, step: int) -> Batch:
        """This rank's part of the step's global batch."""
        shape, indices = self.order(step)
        places = self.mesh.samples(self.recipe.data.batch_size)
        mine = [indices[place] for place in places]
        embeds_BLD = pad_embeds([self.dataset.prompt_embeds(index) for index in mine], self.prompt_tokens)
        guidance_B = None
        if self.embedded_guidance is not None:
            guidance_B = torch.full((len(mine),), self.embedded_guidance, device=self.mesh.device)
        image = condition_of(self.dataset, mine, self.mesh.device)
        return Batch(places, embeds_BLD.to(self.mesh.device), shape, image, guidance_B)

    def train(self) -> None:
        for step in range(self.first_step, self.recipe.max_steps):
            batch = self.batch(step)
            metrics = {}
            if step % self.recipe.fake_score.updates_per_generator_update == 0:
                metrics |= self.dmd2.generator_step(batch, step)
            metrics |= self.dmd2.fake_score_step(batch, step)
            self.after(step + 1, metrics)
        self.monitor.close()

    def after(self, step: int, metrics: dict[str, torch.Tensor | float]) -> None:
        """Logs, validates and saves, after `step` steps."""
        self.monitor.log(step, self.mean_over_ranks(metrics))
        last = step == self.recipe.max_steps
        if self.validation and (last or step % self.recipe.validation.every == 0):
            self.validation.sample(self.engines["generator"].module, self.run / "samples" / f"step_{step:06d}")
        if last or step % self.recipe.save_every == 0:
            checkpoint.save(self.run, step, self.engines, self.recipe, self.dataset.video, self.mesh)

    def mean_over_ranks(self, metrics: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Means of the ranks' numbers, with one collective and one synchronisation."""
        numbers = torch.stack([torch.as_tensor(value, device=self.mesh.device).float() for value in metrics.values()])
        dist.all_reduce(numbers)
        return dict(zip(metrics, (numbers / self.mesh.world_size).tolist(), strict=True))

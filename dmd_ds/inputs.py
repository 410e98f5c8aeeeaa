"""What a recipe names on disk, found and checked before anything is built."""

import dataclasses
from pathlib import Path
from typing import Literal

from dmd_ds import checkpoint
from dmd_ds.data.latents import LatentsDataset
from dmd_ds.data.video import VideoSize
from dmd_ds.errors import UserError
from dmd_ds.generation import read_settings
from dmd_ds.parallel.ema import check_can_average
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.parallel.mesh import check_degrees, world_size
from dmd_ds.planner.sizes import ModelSize
from dmd_ds.recipe import Optimizer, Recipe
from dmd_ds.rewards import check_rewards
from dmd_ds.sampler import few_step_schedule
from dmd_ds.trackers import check_trackers
from dmd_ds.validation import check_validation
from dmd_ds.wan.autoencoder import TIME_STRIDE, latents_shape
from dmd_ds.wan.denoiser import TEXT_TOKENS
from dmd_ds.wan.guidance import has_guidance_embedding
from dmd_ds.wan.weights import find_model, takes_image, transformer_config, transformer_tensors

GuidanceEmbedding = Literal["none", "stored", "fresh"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a recipe names on disk, found and checked before any engine is built."""

    recipe: Recipe
    model: Path
    dataset: LatentsDataset
    latents_shapes: list[tuple[int, int, int, int]]  # [C, T, H, W] of the steps' samples
    shown_shape: tuple[int, int, int, int]  # of what validation makes: the recipe's first size, or the dataset's most common
    video: dict[str, float]  # its frames, height, width and fps
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
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.latents_shapes)
        accumulated = f" x accumulation {recipe.data.accumulation}" if recipe.data.accumulation > 1 else ""
        return (
            f"model {self.model}: {'image' if takes_image(config) else 'text'} to video, {config['num_layers']} layers, "
            f"{config['num_attention_heads']} heads of {config['attention_head_dim']}"
            f"{'' if self.guidance_embedding == 'none' else f', {self.guidance_embedding} guidance embedding'}\n"
            f"data {self.dataset.folder}: {len(self.dataset)} samples, latents {shapes}\n"
            f"{self.ranks()} x batch {recipe.data.batch_size}{accumulated}; steps {self.first_step} to {recipe.max_steps}, "
            f"{self.what_is_trained()}"
        )

    def what_is_trained(self) -> str:
        recipe = self.recipe
        if recipe.stage == "cfg_distill":
            return f"guidance {recipe.cfg_distill.guidance_min:g} to {recipe.cfg_distill.guidance_max:g} in one pass"
        what = {"regression": f"regression to {recipe.regression.target}", "reward": f"rewards {', '.join(recipe.reward.rewards)}"}
        if recipe.fake_score:
            what["dmd2"] = f"a generator update every {recipe.fake_score.updates_per_generator_update}"
        sigmas = " ".join(f"{sigma:.3f}" for sigma in few_step_schedule(recipe.sampling).sigmas)
        return f"{what[recipe.stage]}; sigmas {sigmas}, {recipe.sampling.solver}"


def check_inputs(recipe: Recipe) -> Inputs:
    """Finds everything the recipe names; `UserError` for what is missing or does not fit together."""
    if recipe.score.sigma_min >= recipe.score.sigma_max:
        raise UserError(f"score.sigma_min={recipe.score.sigma_min} is not below score.sigma_max={recipe.score.sigma_max}")
    second = float(few_step_schedule(recipe.sampling).sigmas[1])
    if recipe.score.above_exit and recipe.rollout.exit == "random" and second > recipe.score.sigma_max:
        raise UserError(
            f"score.sigma_max={recipe.score.sigma_max} is below {second:.3f}, the second noise level of sampling, from which on "
            "score.above_exit draws; raise it or let the second level be lower"
        )
    check_trackers(recipe)
    model = find_model(recipe.model.path)
    config = transformer_config(model)
    stored = has_guidance_embedding(transformer_tensors(model))
    if stored and recipe.stage == "cfg_distill":
        raise UserError(f"model.path={recipe.model.path}: has its guidance embedded already, stage=cfg_distill has nothing to teach it")
    fresh = recipe.model.guidance_embedding or recipe.stage == "cfg_distill"
    guidance_embedding = "stored" if stored else "fresh" if fresh else "none"
    if stored and recipe.score.guidance_below < 1:
        raise UserError(f"score.guidance_below={recipe.score.guidance_below}: model.path={recipe.model.path} has its guidance embedded")
    check_degrees(recipe.parallel, config["num_attention_heads"])
    check_gan(recipe, config["num_layers"])
    dataset = LatentsDataset(recipe.data.path)
    sizes = [VideoSize.parse(size) for size in recipe.data.sizes or ()]
    if sizes and (recipe.uses_latents or takes_image(config)):
        raise UserError(f"data.sizes={recipe.data.sizes}: a GAN, data mode and images need the dataset's own; encode the clips at these")
    latents_shapes = [latents_shape(size, config, f"data.sizes={size}: ") for size in sizes] or list(dataset.buckets())
    shown_shape = latents_shapes[0] if sizes else dataset.main_shape
    video = dataset.video | (sizes[0]._asdict() if sizes else {})
    for shape in latents_shapes:
        if shape[0] != config["out_channels"]:
            raise UserError(f"data.path={recipe.data.path}: latents of {shape[0]} channels, model.path takes {config['out_channels']}")
        for size, patch in zip(shape[1:], config["patch_size"], strict=True):
            if size % patch:
                patches = config["patch_size"]
                raise UserError(f"data.path={recipe.data.path}: latents {list(shape[1:])} do not divide into patches {patches}")
    if dataset.most_prompt_tokens > TEXT_TOKENS:
        raise UserError(f"data.path={recipe.data.path}: a prompt of {dataset.most_prompt_tokens} tokens, Wan2.1 takes {TEXT_TOKENS}")
    text_width = dataset.negative_embeds_LD.shape[1]
    if text_width != config["text_dim"]:
        raise UserError(f"data.path={recipe.data.path}: text of width {text_width}, model.path takes {config['text_dim']}")
    check_images(recipe, dataset, config)
    if recipe.stage == "reward":
        check_reward(recipe, model, latents_shapes)
    size = ModelSize.from_config(config)
    sections: dict[str, Optimizer] = {"generator": recipe.generator}
    if recipe.fake_score:
        sections["fake_score"] = recipe.fake_score
    ds_configs = {
        name: complete_ds_config(read_ds_config(f"{name}.ds_config", section.ds_config), section, recipe.data, size)
        for name, section in sections.items()
    }
    if recipe.validation.every:
        check_validation(recipe, model)
    if recipe.generator.ema_decay:
        check_can_average("generator.ema_decay", ds_configs["generator"])
    resume_from = checkpoint.latest(Path(recipe.output_dir))
    first_step = 0
    if resume_from:
        checkpoint.check_same_recipe(resume_from, recipe, world_size())
        first_step = checkpoint.read_state(resume_from).step
    return Inputs(
        recipe, model, dataset, latents_shapes, shown_shape, video, config, guidance_embedding, ds_configs, resume_from, first_step
    )


def check_reward(recipe: Recipe, model: Path, latents_shapes: list[tuple[int, int, int, int]]) -> None:
    check_rewards(recipe.reward.rewards)
    distilled = read_settings(model).few_step
    if distilled and distilled != recipe.sampling:
        grid = f"{distilled.steps} steps, sigmas {' '.join(f'{sigma:.3f}' for sigma in few_step_schedule(distilled).sigmas)}"
        raise UserError(f"sampling is not that of model.path={recipe.model.path}, which was distilled for {grid}, {distilled.solver}")
    fewest = min(TIME_STRIDE * (shape[1] - 1) + 1 for shape in latents_shapes)
    if recipe.reward.frames != "all" and max(recipe.reward.frames) >= fewest:
        raise UserError(f"reward.frames={recipe.reward.frames}: a video has {fewest}, numbered from 0")


def check_gan(recipe: Recipe, layers: int) -> None:
    if recipe.gan.sigma_min >= recipe.gan.sigma_max:
        raise UserError(f"gan.sigma_min={recipe.gan.sigma_min} is not below gan.sigma_max={recipe.gan.sigma_max}")
    for number in recipe.gan.blocks or ():
        if number >= layers:
            raise UserError(f"gan.blocks={recipe.gan.blocks}: there is no block {number}, model.path has {layers}, numbered from 0")


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

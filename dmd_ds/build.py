"""What the stage of a run is made of: its models, sharded over the ranks and loaded a tensor at a time, in their engines."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dmd_ds.distill.cfg import CfgDistillation
from dmd_ds.distill.dmd2 import DMD2Engine
from dmd_ds.distill.regression import Regression
from dmd_ds.distill.reward import RewardTraining
from dmd_ds.distill.stage import FAKE_SCORE, GENERATOR, Stage
from dmd_ds.inputs import GuidanceEmbedding, Inputs
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.engine import frozen, gather_by_block, make_engine, shard, sharded_build, training_dtype
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.rewards import find_rewards
from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.discriminator import HEADS, ScoreModel, default_taps
from dmd_ds.wan.guidance import add_guidance_embedding, fresh_weights
from dmd_ds.wan.weights import empty_transformer, load_weights, renew_buffers


def sharded_transformer(model: Path, config: dict, embedding: GuidanceEmbedding, seed: int, ds_config: dict) -> WanTransformer3DModel:
    """The model's transformer, sharded over the ranks and loaded a tensor at a time; `seed`: of a fresh guidance embedding."""

    def build() -> WanTransformer3DModel:
        transformer = empty_transformer(config)
        return transformer if embedding == "none" else add_guidance_embedding(transformer)

    transformer = sharded_build(ds_config, build)
    renew_buffers(transformer)
    shapes = {name: parameter.ds_shape for name, parameter in transformer.named_parameters()}
    load_weights(transformer, model, shard, fresh_weights(shapes, seed) if embedding == "fresh" else {})
    for parameter in transformer.parameters():
        parameter.ds_secondary_tensor = None  # the copies inside nodes, of hierarchical partitioning, are of what was there before
    return transformer


def build_transformer(inputs: Inputs, engine: str) -> WanTransformer3DModel:
    ds_config = inputs.ds_configs[engine]
    return sharded_transformer(inputs.model, inputs.transformer_config, inputs.guidance_embedding, inputs.recipe.seed, ds_config)


def build_generator(inputs: Inputs, sequence: SequenceParallel) -> WanDenoiser:
    """Trained whole, or as an adapter over frozen weights.

    A fresh guidance embedding is trained beside the adapter: frozen it would stay without effect. A stored one is a part of the
    model like any other and is frozen with it.
    """
    recipe = inputs.recipe
    transformer = build_transformer(inputs, GENERATOR)
    generator = WanDenoiser(transformer, sequence, recipe.activation_checkpointing, recipe.activation_offload)
    if recipe.generator.lora_rank is None:
        return gather_by_block(generator, WanTransformerBlock)
    torch.manual_seed(recipe.seed + 1)  # another adapter than the fake score's, alike on all ranks
    generator.add_adapter(recipe.generator.lora_rank, recipe.generator.lora_alpha)
    if recipe.stage == "reward":
        generator.weigh_adapter()
    if inputs.guidance_embedding == "fresh":
        transformer.condition_embedder.guidance_embedder.requires_grad_(True)
    return generator


def build_score_model(inputs: Inputs, sequence: SequenceParallel) -> ScoreModel:
    recipe = inputs.recipe
    transformer = build_transformer(inputs, FAKE_SCORE)
    taps, head = (), None
    if recipe.gan.is_on:
        torch.manual_seed(recipe.seed)  # the head's first weights, alike on all ranks
        taps = recipe.gan.blocks or default_taps(len(transformer.blocks))
        config = transformer.config
        head = HEADS[recipe.gan.head](len(taps), config.num_attention_heads * config.attention_head_dim, recipe.gan.width)
        head.to(training_dtype())  # an engine's trained weights are of one type
    score_model = ScoreModel(transformer, sequence, recipe.activation_checkpointing, recipe.activation_offload, sorted(taps), head)
    torch.manual_seed(recipe.seed)  # the adapter's first weights, likewise
    score_model.add_adapter(recipe.fake_score.lora_rank, recipe.fake_score.lora_alpha)
    score_model.weigh_adapter()
    return score_model


def build_teacher(inputs: Inputs, sequence: SequenceParallel) -> ScoreModel:
    """The model as it is, frozen: a score model with no adapter over its base."""
    return frozen(ScoreModel(build_transformer(inputs, GENERATOR), sequence), inputs.ds_configs[GENERATOR])


def build_stage(inputs: Inputs, mesh: Mesh, negative_embeds_1LD: torch.Tensor) -> tuple[Stage, WanDenoiser]:
    """The recipe's stage, with its engines, and what its generator is looked at beside: the teacher's model, or the start's."""
    recipe, sequence = inputs.recipe, SequenceParallel(mesh, training_dtype())
    shared = {"negative_embeds_1LD": negative_embeds_1LD, "device": mesh.device}
    if recipe.stage == "dmd2":
        score_model, generator = build_score_model(inputs, sequence), build_generator(inputs, sequence)
        engine = make_engine(generator, inputs.ds_configs[GENERATOR])
        fake_score = make_engine(score_model, inputs.ds_configs[FAKE_SCORE])
        return DMD2Engine(recipe, engine, fake_score, two_pass_guidance=inputs.two_pass_guidance, **shared), score_model
    if recipe.stage == "reward":
        generator = build_generator(inputs, sequence)
        vae, rewards = load_autoencoder(inputs.model, mesh.device), find_rewards(recipe.reward.rewards)
        engine = make_engine(generator, inputs.ds_configs[GENERATOR])
        return RewardTraining(recipe, engine, vae, rewards, mesh.device), generator
    teacher = build_teacher(inputs, sequence)
    engine = make_engine(build_generator(inputs, sequence), inputs.ds_configs[GENERATOR])
    if recipe.stage == "cfg_distill":
        return CfgDistillation(recipe, engine, teacher, **shared), teacher
    return Regression(recipe, engine, teacher, two_pass_guidance=inputs.two_pass_guidance, **shared), teacher

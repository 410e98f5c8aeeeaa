"""Memory a GPU: every term has a cause that was seen alive at a measured peak, and none was fitted.

Bytes throughout. Tokens n of this rank, batch b, model width D, feed-forward width F; `u` = b n D. `a` is the bytes of a weight
or activation. DeepSpeed 0.19.8 and torch 2.13 are the sources of what is kept; the order of a block is that of diffusers'
WanTransformerBlock with the processors of wan.denoiser.
"""

import dataclasses
import math

from dmd_ds.planner.block import Block
from dmd_ds.planner.sizes import Setup, Zero

VAE_WEIGHTS = 126_892_531  # of Wan2.1's AutoencoderKLWan, kept in float32
VAE_CHANNELS = 96  # of its decoder at full resolution
ROPE_POSITIONS = 1024
GAN_TAPS = 3  # blocks whose features the head reads where the recipe names none

Terms = dict[str, float]


def merged(*parts: Terms) -> Terms:
    out: Terms = {}
    for part in parts:
        for name, size in part.items():
            out[name] = out.get(name, 0) + size
    return {name: size for name, size in out.items() if size}


# ---- what is there all the time ---------------------------------------------------------------------------------------


def trained(setup: Setup, who: str, weights: list[int], zero: Zero) -> Terms:
    """Of weights that an engine trains, this rank's part: weights, a float32 copy (on the CPU too), Adam's two moments, gradients."""
    part, a = setup.part(weights), setup.precision.weights
    states = {f"{who}: fp32 master weights": 4 * part, f"{who}: Adam moments": 8 * part, f"{who}: gradients": a * part}
    if zero.bf16_states:
        states = {f"{who}: Adam moments": 4 * part, f"{who}: gradients": a * part}
    return {**resident(f"{who}: weights", a * part, zero), **({} if zero.offload_optimizer else states)}


def resident(name: str, size: float, zero: Zero) -> Terms:
    """A rank's part of an engine's weights, where it does not lie in the host's memory."""
    return {} if zero.offload_param else {name: size}


def copies_inside(setup: Setup) -> Terms:
    """Of hierarchical partitioning: the weights once more, over the ranks of each node."""
    zeros, a = {"generator": setup.generator_zero, "score": setup.fake_score_zero}, setup.precision.weights
    ranks = {"generator": setup.generator_lora_rank, "score": setup.lora_rank}
    weights = {name: setup.model.weights() + (setup.model.adapter(rank) if rank else []) for name, rank in ranks.items()}
    return {
        f"{name}: copies inside nodes": a * sum(-(-numel // zero.inside) for numel in weights[name])
        for name, zero in zeros.items()
        if zero.inside > 1
    }


def taps(setup: Setup) -> int:
    """How many blocks the head reads."""
    return len(setup.gan.blocks) if setup.gan.blocks else min(GAN_TAPS, setup.model.layers)


def gan_head(setup: Setup) -> list[int]:
    """Its weights, by those of wan.discriminator."""
    if not setup.judged:
        return []
    D, h = setup.model.width, setup.gan.width
    if setup.gan.head == "token":
        return taps(setup) * [D * h, h, h, 1]
    attention = [5 * h * h, h, *4 * [h], 3 * h * h, 3 * h, h * h, h, 4 * h * h, 4 * h, 4 * h * h, h]
    return taps(setup) * [5 * D * h, h, *2 * [5 * h * h, h], *2 * attention, h, 1]


def head_activations(setup: Setup, samples: float) -> Terms:
    """What the head keeps for its backward of so many samples of the batch: the normed features, its layers' inputs."""
    D, h, a = setup.model.width, setup.gan.width, setup.precision.weights
    if setup.gan.head == "token":
        return {"GAN head": taps(setup) * samples * setup.batch * setup.rank_tokens * (D + 2 * h) * a}
    return {"GAN head": taps(setup) * samples * setup.batch * setup.tokens * (2 * D + 3 * h) * a}


def generator_trained(setup: Setup) -> list[int]:
    return setup.model.weights() if setup.generator_lora_rank is None else setup.model.adapter(setup.generator_lora_rank)


def buffers(setup: Setup) -> Terms:
    """One bucket an engine that gradients are laid into (contiguous_gradients), and the weights too small to be cut up."""
    a = setup.precision.weights
    zeros = (setup.generator_zero, setup.fake_score_zero)
    small = 0
    for zero, rank in zip(zeros, (setup.generator_lora_rank, setup.lora_rank), strict=True):
        weights = setup.model.weights() + (setup.model.adapter(rank) if rank else [])
        apart = setup.gpus > 1 or zero.offload_param
        small += sum(numel for numel in weights if numel <= zero.persistence and apart)
    return {
        "gradient buckets": a * sum(zero.reduce_bucket for zero in zeros),
        "small weights kept whole": a * small,
        "rotary tables": 2 * 2 * ROPE_POSITIONS * setup.model.head_dim * 4,
    }


def always(setup: Setup) -> Terms:
    """What a rank holds between two steps."""
    model, a = setup.model, setup.precision.weights
    base = a * setup.part(model.weights())
    frozen = resident("generator: frozen weights", base, setup.generator_zero) if setup.generator_lora else {}
    everything = model.weights() if not setup.generator_lora else generator_trained(setup)
    return merged(
        frozen,
        trained(setup, "generator", generator_trained(setup), setup.generator_zero),
        resident("score: frozen base", base, setup.fake_score_zero),
        trained(setup, "fake score LoRA", model.adapter(setup.lora_rank), setup.fake_score_zero),
        trained(setup, "GAN head", gan_head(setup), setup.fake_score_zero),
        {"EMA of the generator, fp32": 4 * setup.part(everything) if setup.ema and not setup.generator_zero.offload_optimizer else 0},
        {"VAE of validation, fp32": 4 * VAE_WEIGHTS if setup.validation else 0},
        copies_inside(setup),
        buffers(setup),
    )


# ---- what is gathered -------------------------------------------------------------------------------------------------


def gathered_forward(block: Block, zero: Zero) -> Terms:
    """Whole weights in a forward, of several ranks' parts or from the host.

    The generator's blocks, trained whole, are fetched at once, ahead of their use by what max_live_parameters allows: each
    module's call starts another bucket of prefetch. Under LoRA layers come one by one: the score's trace is dropped at each
    change between real and fake phases, and prefetch with it. And a layer is let go before its adapter's part is added, so it
    stands where the sum of the two will: in the feed-forward, which is the widest.
    """
    setup = block.setup
    if setup.gpus == 1 and not zero.offload_param:
        return {}
    a, weights = setup.precision.weights, setup.model.block_weights()
    if block.lora:
        twice = 2 * max(weights)  # as it arrives and as it is cut
        return {"gathered layer": max(0, a * (twice - block.u * block.wide))}
    one, whole = sum(weights), setup.model.layers * sum(weights)
    bucket = min(zero.prefetch, whole)
    ahead = min(zero.max_live + bucket, whole) if zero.prefetch else one
    return {"gathered block": a * min(one + bucket, whole), "gathered ahead": a * ahead}


def gathered_backward(setup: Setup, rank: int | None, zero: Zero) -> Terms:
    """The block that runs again: fetched at once, or layer by layer and held until its backward ends. Or all, held since the forward."""
    if setup.gather == "update":
        return weights_held(setup, rank, zero)
    apart = setup.gpus > 1 or zero.offload_param
    return {"gathered block": setup.precision.weights * sum(setup.model.block_weights()) if apart else 0}


def weights_held(setup: Setup, rank: int | None, zero: Zero) -> Terms:
    """All weights of a model under an adapter of that rank, if any, whole at once; the small ones always are."""
    if setup.gpus == 1 and not zero.offload_param:
        return {}
    weights = setup.model.weights() + (setup.model.adapter(rank) if rank else [])
    return {"weights held": setup.precision.weights * sum(numel for numel in weights if numel > zero.persistence)}


def reducing(setup: Setup, rank: int | None, zero: Zero) -> float:
    """The bucket's gradients laid out a rank after the other for the reduce-scatter."""
    weights = setup.model.block_weights() if rank is None else setup.model.block_adapter(rank)
    return setup.precision.weights * max(max(weights), min(zero.reduce_bucket, sum(weights)))


# ---- a step, phase by phase -------------------------------------------------------------------------------------------


def latents_bytes(setup: Setup, samples: float) -> Terms:
    """So many float32 tensors of the size of the batch's latents."""
    return {"latents and noise": 4 * samples * setup.batch * setup.model.out_channels * math.prod(setup.latents)}


def backward_phases(setup: Setup, block: Block, name: str, zero: Zero, latents: Terms) -> dict[str, Terms]:
    """The backward's turns, of which any may be the peak."""
    phases = {}
    a = setup.precision.weights
    for moment, (activations, gradients) in block.backward_moments().items():
        phases[f"{name} backward, {moment}"] = merged(
            {"kept for the backward": block.graph(), "the block that runs again": activations + block.around},
            {"gradients of a block": a * gradients},
            {"gradients under reduction": reducing(setup, block.rank, zero) if moment == "block's end" else 0},
            gathered_backward(setup, block.rank, zero),
            latents,
        )
    return phases


def optimizer_phase(setup: Setup, weights: list[int], zero: Zero) -> Terms:
    """The largest sub-group's update: its gradients in float32; where Adam is not fused the root of the second moment, on the CPU a
    quotient too."""
    if zero.offload_optimizer:
        return {}
    part, a = min(setup.part(weights), zero.sub_group), setup.precision.weights
    copies = 1 if zero.fused else 2 if setup.precision.accelerator else 3
    flat = a if a == 4 else a + 4  # gradients side by side, then in float32
    return {"update of a sub-group": part * (a * copies if zero.bf16_states else max(4 * copies, flat))}


def rollout_phase(setup: Setup, block: Block) -> Terms:
    """The generator's forwards without gradient."""
    zero = setup.generator_zero
    gathered = gathered_forward(block, zero) if setup.gather == "each" else weights_held(setup, setup.generator_lora_rank, zero)
    return merged(gathered, {"a block's forward": block.forward()}, latents_bytes(setup, 3))


def arrival_phase(setup: Setup, block: Block) -> Terms:
    """The last block of a generator that is held whole arrives: once as it comes from the ranks, once put together."""
    if setup.gather == "each" or setup.generator_lora:
        return {}
    held = weights_held(setup, None, setup.generator_zero)
    arriving = {"a block as it arrives": setup.precision.weights * sum(setup.model.block_weights())} if held else {}
    return merged(held, arriving, {"a block's input": block.u * block.a + block.around}, latents_bytes(setup, 3))


def generator_phases(setup: Setup) -> dict[str, Terms]:
    zero = setup.generator_zero
    block = Block(setup, setup.batch, setup.generator_lora_rank)
    score = Block(setup, setup.score_parts * setup.batch, setup.lora_rank)
    each, whole = gathered_forward(block, zero), weights_held(setup, setup.generator_lora_rank, zero)
    kept_whole = whole if setup.gather == "update" else {}
    graph = {"kept for the backward": block.graph() + block.last_layer()}
    parts = setup.score_parts
    phases = {
        "generator: rollout without gradient": rollout_phase(setup, block),
        "generator: last block of the rollout arrives": arrival_phase(setup, block),
        # at its beginning, what a rollout has held is whole; at the last block, whose input is part of the graph, it is let go
        "generator: exit forward begins": merged(
            each if setup.gather == "each" else whole, {"a block's forward": block.forward_with_graph()}, latents_bytes(setup, 3)
        ),
        "generator: exit forward": merged(
            kept_whole or each,
            {"kept for the backward": block.before_last()},
            {"a block's forward": block.forward_with_graph()},
            latents_bytes(setup, 3),
        ),
        "generator: scores without gradient": merged(
            gathered_forward(score, setup.fake_score_zero),
            kept_whole,
            graph,
            {"rotary of the exit forward": block.around},
            {"a block's forward, scores": score.forward()},
            latents_bytes(setup, 2 * parts + 4),
        ),
        **backward_phases(setup, block, "generator:", zero, latents_bytes(setup, parts + 6)),
        "generator: optimiser": merged(optimizer_phase(setup, generator_trained(setup), zero), latents_bytes(setup, parts + 5)),
    }
    if setup.judged:
        # gradients flow through the score's base to x0, the generator's graph waits
        features = Block(setup, setup.batch, setup.lora_rank)
        waiting = merged(graph, kept_whole, latents_bytes(setup, parts + 6))
        phases |= backward_phases(setup, features, "generator: GAN", setup.fake_score_zero, waiting)
    return phases


def fake_score_phases(setup: Setup) -> dict[str, Terms]:
    zero = setup.fake_score_zero
    rollout = Block(setup, setup.batch, setup.generator_lora_rank)
    block = Block(setup, (1 + setup.judged) * setup.batch, setup.lora_rank)
    # x0, noise, noised latents, velocity and its target; for the head the dataset's latents, their noise, and all that is judged
    held = latents_bytes(setup, 7 + 3 * setup.judged if setup.judged else 5)
    return {
        "fake score: rollout without gradient": rollout_phase(setup, rollout),
        "fake score: last block of the rollout arrives": arrival_phase(setup, rollout),
        "fake score: forward": merged(
            weights_held(setup, setup.lora_rank, zero) if setup.gather == "update" else gathered_forward(block, zero),
            {"kept for the backward": block.before_last()},
            {"a block's forward": block.forward_with_graph()},
            held,
            head_activations(setup, setup.judged) if setup.judged else {},  # gone before the blocks' backward
        ),
        **backward_phases(setup, block, "fake score:", zero, held),
        "fake score: optimiser": merged(
            optimizer_phase(setup, setup.model.adapter(setup.lora_rank) + gan_head(setup), zero), latents_bytes(setup, 5)
        ),
    }


def validation_phases(setup: Setup) -> dict[str, Terms]:
    """Decoding one clip: the video grows, and at each step is copied to its new length; four frames at full resolution run
    through three residual blocks, in float32."""
    if not setup.validation:
        return {}
    frames, height, width = setup.latents[0] * 4 - 3, setup.latents[1] * 8, setup.latents[2] * 8
    four = 4 * height * width * 4 * VAE_CHANNELS
    # input, norm, its padded copy of six frames, result; two frames of each of seven convolutions' inputs are kept
    return {
        "validation: decoding": {
            "a residual block of the VAE": four * (1 + 1 + 1.5 + 1),
            "frames the VAE's convolutions keep": four / 4 * 2 * 7,
            "video": 2 * 3 * frames * height * width * 4,
        }
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by cause: between steps, and what each phase adds."""

    always: Terms
    phases: dict[str, Terms]

    @property
    def standing(self) -> float:
        return sum(self.always.values())

    def of(self, phase: str) -> float:
        return self.standing + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.of)

    @property
    def peak(self) -> float:
        return self.of(self.peak_phase)

    def step_peak(self, step: str) -> float:
        """Of the phases whose name begins so: `generator`, `fake score`, `validation`."""
        return max(self.of(phase) for phase in self.phases if phase.startswith(step))


def memory(setup: Setup) -> Memory:
    """`Setup` as it will be on the fullest GPU."""
    return Memory(always(setup), {**generator_phases(setup), **fake_score_phases(setup), **validation_phases(setup)})

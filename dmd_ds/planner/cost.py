"""Bytes moved and seconds, a trainer step: an estimate for comparing settings, not a promise.

A generator step is counted at its share, 1 / updates_per_generator_update. Bytes are what one GPU sends. All rates are in bytes or
operations a second.
"""

import dataclasses

from dmd_ds.planner.sizes import Setup

HOST_BYTES_A_SECOND = 100e9  # memory of a node's host, shared by its GPUs: what Adam on the CPU is bound by


@dataclasses.dataclass(frozen=True)
class Machine:
    """`nvlink` a GPU, `network` a node, `pcie` a GPU; `flops` of a GPU at its peak, of which `mfu` is reached.
    Of `memory` the reserve is left to the CUDA context, NCCL's buffers and the allocator's fragments, which no tensor shows."""

    gpus_per_node: int = 8
    memory: float = 80e9
    reserve: float = 5e9
    flops: float = 989e12
    mfu: float = 0.4
    nvlink: float = 400e9
    network: float = 400e9
    pcie: float = 25e9

    @property
    def usable(self) -> float:
        return self.memory - self.reserve


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a step runs a model, in its trainer step's mean."""

    rollout: float  # the generator without gradient, batch b
    generator: float  # forward, recomputation and backward
    scores: float  # the score without gradient
    fake_score: float  # forward, recomputation and backward of the score
    gan: float  # the same through the score's features, for the generator's gradient


def passes(setup: Setup) -> Passes:
    """The K - 1 forwards before the last step lead up to the exit step; half of them in the mean where it is drawn evenly."""
    share, before = 1 / setup.generator_every, (setup.sampling_steps - 1) / (1 if setup.exits_last else 2)
    return Passes(
        rollout=share * before + before + 1,
        generator=share,
        scores=share,
        fake_score=1,
        gan=share if setup.judged else 0,
    )


def flops(setup: Setup) -> float:
    """Of one GPU. A backward of all weights costs two forwards, one of a frozen base under LoRA costs one; checkpointing one more."""
    count, again = passes(setup), 1 if setup.checkpointing else 0
    forward = setup.model.forward_flops(setup.tokens, setup.text_tokens) * setup.batch / setup.a_sample
    whole, adapter = 3 + again, 2 + again
    generator = adapter if setup.generator_lora else whole
    scores_batch, fake_batch = setup.score_parts, 1 + setup.judged
    return forward * (
        count.rollout + count.generator * generator + count.scores * scores_batch + count.fake_score * fake_batch * adapter
        + count.gan * adapter
    )  # fmt: skip


def gathers(setup: Setup) -> tuple[float, float]:
    """How often a step brings together the weights of the generator, and of the score."""
    count = passes(setup)
    rollouts = 1 + count.generator  # one for each update of either model; the last forward of the generator's own has the gradient
    forwards = count.rollout + count.generator if setup.gather == "each" else rollouts
    backward = 0 if setup.gather == "update" else 1  # a block is gathered once for its recomputation and its backward
    # for the gradient of a GAN the generator has no forward of its own to hold the score's weights from
    return forwards + backward * count.generator, count.scores + (1 + backward) * count.fake_score + 2 * count.gan


def backward_samples(setup: Setup) -> float:
    """Backwards a step through a whole model, in samples of the batch."""
    count = passes(setup)
    return count.generator + count.gan + count.fake_score * (1 + setup.judged)


def collectives(setup: Setup) -> dict[str, float]:
    """Bytes that one GPU sends a step, by collective. Tokens L, width D, Ulysses U, ring R."""
    count, a, model, world = passes(setup), setup.precision.weights, setup.model, setup.gpus
    others = (world - 1) / world
    whole, adapter = sum(model.weights()), sum(model.adapter(setup.lora_rank))
    generator_passes, score_passes = gathers(setup)
    own = sum(model.adapter(setup.generator_lora_rank)) if setup.generator_lora_rank else 0
    trained = own or whole
    L, U, R = setup.tokens, setup.ulysses, setup.ring
    # queries, keys, values and result change hands; back again in the backward
    exchanged = 4 * L * model.width / (U * R) * (U - 1) / U * a
    passed_on = 2 * L * model.width / U * (R - 1) / R * a
    home = 2 * L * model.width / U * 4 if R > 1 else 0  # gradients of keys and values in float32, a full round
    backwards = backward_samples(setup)
    forwards = count.rollout + count.scores * setup.score_parts + backwards * (2 if setup.checkpointing else 1)
    blocks = setup.batch * model.layers
    gathered = generator_passes * (whole + own) + score_passes * (whole + adapter)
    return {
        "all-gather of weights": a * others * gathered,
        "reduce-scatter of gradients": a * others * (count.generator * trained + count.fake_score * adapter),
        "all-to-all of Ulysses": blocks * exchanged * (forwards + backwards),
        "ring": blocks * (passed_on * (forwards + backwards) + home * backwards),
    }


def between_nodes(setup: Setup, machine: Machine) -> float:
    """Bytes a GPU sends out of its node a step. Of a ring over all GPUs each node sends every weight but its own on once, and its
    GPUs share that; the ranks of a sample sit inside one node. Where nodes have copies, only what an update has changed is sent,
    once."""
    nodes = -(-setup.gpus // machine.gpus_per_node)
    if nodes == 1:
        return 0
    model, count, a = setup.model, passes(setup), setup.precision.weights
    whole, adapter = sum(model.weights()), sum(model.adapter(setup.lora_rank))
    own = sum(model.adapter(setup.generator_lora_rank)) if setup.generator_lora_rank else 0
    generator_passes, score_passes = gathers(setup)
    of_generator = count.generator * (own or whole) if setup.generator_zero.inside > 1 else generator_passes * (whole + own)
    of_score = count.fake_score * adapter if setup.fake_score_zero.inside > 1 else score_passes * (whole + adapter)
    reduced = count.generator * (own or whole) + count.fake_score * adapter
    return a * (of_generator + of_score + reduced) * (1 - 1 / nodes) / machine.gpus_per_node


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A trainer step, by cause. Weights move while others compute; what attention exchanges, and the update, is waited for."""

    compute: float
    weights: float
    attention: float
    offload: float

    @property
    def step(self) -> float:
        return max(self.compute, self.weights) + self.attention + self.offload


def seconds(setup: Setup, machine: Machine) -> Seconds:
    moved = collectives(setup)
    inside = (moved["all-gather of weights"] + moved["reduce-scatter of gradients"]) / machine.nvlink
    outside = between_nodes(setup, machine) * machine.gpus_per_node / machine.network
    return Seconds(
        compute=flops(setup) / (machine.flops * machine.mfu),
        weights=max(inside, outside),
        attention=(moved["all-to-all of Ulysses"] + moved["ring"]) / machine.nvlink,
        offload=offload_seconds(setup, machine),
    )


def offload_seconds(setup: Setup, machine: Machine) -> float:
    """Of what lies on the host: Adam's 28 bytes a weight (four read, three written) in its memory, gradients down and weights up;
    a rank's part of the weights up at each gather; a block's input down and up for each backward."""
    a, model, host = setup.precision.weights, setup.model, HOST_BYTES_A_SECOND / min(setup.gpus, machine.gpus_per_node)
    adapter = setup.part(model.adapter(setup.lora_rank))
    generator = setup.part(model.adapter(setup.generator_lora_rank) if setup.generator_lora_rank else model.weights())
    zeros = (setup.generator_zero, setup.fake_score_zero)
    updates = (generator / setup.generator_every, adapter)
    updated = sum(weights for weights, zero in zip(updates, zeros, strict=True) if zero.offload_optimizer)
    base = setup.part(model.weights())
    fetched = sum(times * base for times, zero in zip(gathers(setup), zeros, strict=True) if zero.offload_param)
    inputs = 2 * model.layers * setup.batch * setup.rank_tokens * model.width if setup.activation_offload else 0
    return updated * (2 * a / machine.pcie + 28 / host) + a * (fetched + inputs * backward_samples(setup)) / machine.pcie

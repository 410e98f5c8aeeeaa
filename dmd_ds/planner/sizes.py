"""The sizes a plan is made from: the model's weights, the video's tokens, how both are spread over GPUs.

Units: elements unless a name says bytes. D model width, F width of the feed-forward, r rank of a LoRA adapter.
"""

import dataclasses
import math
from typing import Any

from dmd_ds.errors import UserError
from dmd_ds.recipe import Recipe
from dmd_ds.stages import Gan

TEXT_TOKENS = 512  # Wan2.1 pads its text to this length (wan.denoiser)
VAE_TIME_STRIDE, VAE_SPACE_STRIDE = 4, 8


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """A WanTransformer3DModel by its configuration (diffusers); `image_dim` is the width of I2V's image features, 0 in T2V."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    image_dim: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelSize":
        """Of a transformer/config.json of diffusers."""
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            ffn=config["ffn_dim"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            patch=tuple(config.get("patch_size") or (1, 2, 2)),
            image_dim=config.get("image_dim") or 0,
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def block_weights(self) -> list[int]:
        """Elements of each weight of one block."""
        D, F = self.width, self.ffn
        attention = 4 * [D * D, D] + 2 * [D]  # q, k, v, out with bias; the norms of q and k
        image = 2 * [D * D, D] + [D] if self.image_dim else []
        return [6 * D, *attention, *attention, *image, D, D, D * F, F, F * D, D]

    def outer_weights(self) -> list[int]:
        """Elements of each weight outside the blocks."""
        D, patch, I = self.width, math.prod(self.patch), self.image_dim  # noqa: E741
        image = [I, I, I * I, I, I * D, D, D, D] if I else []
        return [
            *(self.in_channels * patch * D, D),  # patches
            *(self.freq_dim * D, D, D * D, D, 6 * D * D, 6 * D),  # time
            *(self.text_dim * D, D, D * D, D),  # text
            *image,
            *(2 * D, D * self.out_channels * patch, self.out_channels * patch),  # last modulation and projection
        ]

    def weights(self) -> list[int]:
        return self.outer_weights() + self.layers * self.block_weights()

    def block_adapter(self, r: int) -> list[int]:
        """Elements of each LoRA weight of one block: over eight D x D layers (ten with images) and the two of the feed-forward."""
        D, F = self.width, self.ffn
        return 8 * [r * D, D * r] + [r * D, F * r, r * F, D * r]

    def zero_sizes(self) -> dict[str, int]:
        """What "auto" stands for in a ds_configs/*.json, in elements.

        A block is fetched while the one before it computes; three are whole at a time. Its gradients leave at once, or by the
        200 million: a larger bucket only takes room. Norms, biases and modulations, at most 6 D or F, are never cut up: a
        collective for each costs more than they weigh.
        """
        block = sum(self.block_weights())
        return {
            "reduce_bucket_size": min(block, 200_000_000),
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 3 * block,
            "stage3_param_persistence_threshold": 8 * self.width,
        }

    def adapter(self, r: int) -> list[int]:
        return self.layers * self.block_adapter(r)

    def forward_flops(self, tokens: int, text_tokens: int) -> float:
        """Floating-point operations of one sample's forward: two a weight and token, and the attention's two products."""
        D, F = self.width, self.ffn
        linear = 2 * tokens * (6 * D * D + 2 * D * F) + 2 * text_tokens * 2 * D * D
        attention = 4 * D * tokens * (tokens + text_tokens)
        return self.layers * (linear + attention)


PUBLISHED = {
    "1.3b": ModelSize(layers=30, heads=12, head_dim=128, ffn=8960),
    "14b": ModelSize(layers=40, heads=40, head_dim=128, ffn=13824),
}


def published_size(*names: str) -> ModelSize | None:
    """The published Wan2.1 size that a recipe's or a model's name speaks of."""
    text = " ".join(names).lower().replace("_", ".").replace("-", ".")
    for name, size in PUBLISHED.items():
        if name in text:
            return dataclasses.replace(size, in_channels=36, image_dim=1280) if "i2v" in text else size
    return None


@dataclasses.dataclass(frozen=True)
class Video:
    """A clip in pixels; `frames` is 4 n + 1."""

    frames: int = 81
    height: int = 480
    width: int = 832

    def latents(self) -> tuple[int, int, int]:
        """[T, H, W]; `UserError` for sizes that Wan's VAE and patches do not divide."""
        if (self.frames - 1) % VAE_TIME_STRIDE:
            raise UserError(f"--frames {self.frames}: Wan's VAE takes 4 n + 1 frames; try {(self.frames - 1) // 4 * 4 + 1}")
        for name, size in (("--height", self.height), ("--width", self.width)):
            if size % (2 * VAE_SPACE_STRIDE):
                raise UserError(f"{name} {size}: must divide by 16, the VAE's 8 times patches of 2")
        return (self.frames - 1) // VAE_TIME_STRIDE + 1, self.height // VAE_SPACE_STRIDE, self.width // VAE_SPACE_STRIDE


@dataclasses.dataclass(frozen=True)
class Precision:
    """`weights`: bytes of a weight or activation. `accelerator`: kernels are those of a GPU (one root of Adam instead of a
    root and a quotient, norms that keep no product), not those of the CPU."""

    weights: int = 2
    accelerator: bool = True


def with_auto_sizes(config: dict[str, Any], model: ModelSize) -> dict[str, Any]:
    """The DeepSpeed configuration with the model's sizes where it says "auto"."""
    zero = config["zero_optimization"]
    return {**config, "zero_optimization": {**zero, **{k: size for k, size in model.zero_sizes().items() if zero.get(k) == "auto"}}}


@dataclasses.dataclass(frozen=True)
class Zero:
    """What a ds_configs/*.json says of buffers, in elements, and of what lies where; the defaults are DeepSpeed's.

    `bf16_states`: weights have no float32 copy, and Adam's moments are bf16 too. `inside`: ranks of a node among which each node
    has a copy of the weights (hierarchical partitioning, hpZ); 1 is none. `fused`: Adam's update is one kernel.
    """

    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    reduce_bucket: int = 500_000_000
    persistence: int = 100_000
    sub_group: int = 1_000_000_000
    inside: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    bf16_states: bool = False
    fused: bool = False

    @classmethod
    def from_ds_config(cls, config: dict[str, Any], model: ModelSize) -> "Zero":
        section = with_auto_sizes(config, model)["zero_optimization"]
        names = {
            "prefetch": "stage3_prefetch_bucket_size",
            "max_live": "stage3_max_live_parameters",
            "reduce_bucket": "reduce_bucket_size",
            "persistence": "stage3_param_persistence_threshold",
            "sub_group": "sub_group_size",
            "inside": "zero_hpz_partition_size",
        }
        given = {field: int(section[name]) for field, name in names.items() if section.get(name, "auto") != "auto"}
        offloads = {key: (section.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")}
        bf16 = config.get("bf16", {})
        states = bf16.get("bf16_master_weights_and_grads", False) and bf16.get("bf16_optimizer_states", False)
        fused = config.get("optimizer", {}).get("params", {}).get("fused", False)
        return cls(**given, **offloads, bf16_states=states, fused=fused)


@dataclasses.dataclass(frozen=True)
class Setup:
    """One way to run a recipe."""

    model: ModelSize
    latents: tuple[int, int, int]  # T, H, W
    gpus: int
    ulysses: int = 1
    ring: int = 1
    batch: int = 1
    text_tokens: int = TEXT_TOKENS
    checkpointing: bool = True
    activation_offload: bool = False
    generator_lora_rank: int | None = None
    ema: bool = False
    gan: Gan = Gan()
    validation: bool = True
    lora_rank: int = 128  # of the fake score
    score_parts: int = 3  # fake, real conditional, real unconditional; two at guidance 1
    generator_every: int = 5
    sampling_steps: int = 4
    gather: str = "rollout"  # what stays whole: recipe's parallel.gather
    exits_last: bool = False  # the rollout's exit step is the last one; else it is drawn
    generator_zero: Zero = Zero()
    fake_score_zero: Zero = Zero()
    precision: Precision = Precision()

    def __post_init__(self):
        if self.gpus % self.a_sample:
            raise UserError(
                f"parallel.ulysses={self.ulysses} x parallel.ring={self.ring} = {self.a_sample} does not divide --gpus {self.gpus}"
            )
        if self.model.heads % self.ulysses:
            raise UserError(f"parallel.ulysses={self.ulysses} does not divide the {self.model.heads} attention heads of the model")

    @property
    def generator_lora(self) -> bool:
        return self.generator_lora_rank is not None

    @property
    def judged(self) -> int:
        """Samples a batch's sample that the discriminator sees in the fake score's turn: generated, real, disturbed for R1."""
        return 0 if not self.gan.is_on else 3 if self.gan.r1_weight else 2

    @property
    def a_sample(self) -> int:
        """Ranks that share a sample."""
        return self.ulysses * self.ring

    @property
    def tokens(self) -> int:
        """Of a whole sample."""
        return math.prod(size // patch for size, patch in zip(self.latents, self.model.patch, strict=True))

    @property
    def rank_tokens(self) -> int:
        """Of one rank, padding counted."""
        return -(-self.tokens // self.a_sample)

    @property
    def samples_a_step(self) -> int:
        return self.batch * self.gpus // self.a_sample

    def part(self, weights: list[int]) -> int:
        """Elements of one rank's part: ZeRO-3 cuts each weight into equal parts, the last padded."""
        return sum(-(-numel // self.gpus) for numel in weights)


def setup_of(recipe: Recipe, model: ModelSize, video: Video, gpus: int, ds_configs: dict[str, dict], **options) -> Setup:
    """The setup that the recipe of DMD2 itself asks for."""
    assert recipe.fake_score
    return Setup(
        model=model,
        latents=video.latents(),
        gpus=gpus,
        ulysses=recipe.parallel.ulysses,
        ring=recipe.parallel.ring,
        batch=recipe.data.batch_size,
        checkpointing=recipe.activation_checkpointing,
        activation_offload=recipe.activation_offload,
        generator_lora_rank=recipe.generator.lora_rank,
        validation=recipe.validation.every > 0,
        ema=recipe.generator.ema_decay is not None,
        gan=recipe.gan,
        lora_rank=recipe.fake_score.lora_rank,
        score_parts=2 if recipe.score.guidance == 1.0 else 3,
        generator_every=recipe.fake_score.updates_per_generator_update,
        sampling_steps=recipe.sampling.steps,
        gather=recipe.parallel.gather,
        exits_last=recipe.rollout.exit == "last",
        generator_zero=Zero.from_ds_config(ds_configs["generator"], model),
        fake_score_zero=Zero.from_ds_config(ds_configs["fake_score"], model),
        **options,
    )

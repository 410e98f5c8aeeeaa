"""The guidance embedding of the cfg-distilled Wan2.1: the guidance scale as an input, so that one pass is a guided one.

A small network on the sinusoidal embedding of 1000 x guidance, added to the time embedding. At one fixed guidance it adds a
constant, which folds into the bias of the time embedding's last layer: the result is a stock Wan2.1.
"""

from collections.abc import Callable, Container, Mapping

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding

from dmd_ds.wan.original import GUIDANCE

FOLDED_INTO = "condition_embedder.time_embedder.linear_2.bias"
FIRST, LAST = (f"{GUIDANCE}.linear_{number}" for number in (1, 2))


def has_guidance_embedding(names: Container[str]) -> bool:
    """Whether tensors of these names (diffusers') are those of a guidance-embedded model."""
    return f"{FIRST}.weight" in names


def takes_guidance(transformer: WanTransformer3DModel) -> bool:
    """Whether the module has an embedding."""
    return hasattr(transformer.condition_embedder, "guidance_embedder")


def add_guidance_embedding(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """The same model with an embedding whose weights are still to be loaded."""
    config = transformer.config
    embedder = TimestepEmbedding(config.freq_dim, config.num_attention_heads * config.attention_head_dim)
    transformer.condition_embedder.guidance_embedder = embedder
    return transformer


def fresh_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """First weights of an embedding for a model that has none, by name: zero where they come out, so it has no effect at first.

    Where they go in, they are of the slowest fifth of the waves, which turn less than once over a guidance of 10: the quick ones turn
    many times from one guidance to the next, and of all together comes noise, from which training would first have to find the way.
    """
    generator = torch.Generator().manual_seed(seed)
    fresh = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(GUIDANCE)}
    waves = fresh[f"{FIRST}.weight"].unflatten(1, (2, -1))  # cosines, then sines, from quick to slow
    slow = waves[..., -max(1, waves.shape[2] // 5) :]
    slow.normal_(std=slow.shape[2] ** -0.5, generator=generator)
    return fresh


def folded_bias(read: Callable[[str], torch.Tensor], guidance: float) -> torch.Tensor:
    """The bias `[D]` of the time embedding's last layer with this guidance in it; `read` gives the tensor of a name."""

    def linear(x: torch.Tensor, layer: str) -> torch.Tensor:
        return read(f"{layer}.weight").double() @ x + read(f"{layer}.bias").double()

    width = read(f"{FIRST}.weight").shape[1]
    sinusoidal = get_timestep_embedding(torch.tensor([1000.0 * guidance]), width, flip_sin_to_cos=True, downscale_freq_shift=0)
    constant = linear(torch.nn.functional.silu(linear(sinusoidal[0].double(), FIRST)), LAST)
    bias = read(FOLDED_INTO)
    return (bias.double() + constant).to(bias.dtype)

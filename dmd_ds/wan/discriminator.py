"""The score model with a GAN head on its features: real score, fake score and discriminator are one module.

Shape suffixes: B batch, J judged samples, C channels, T latent frames, H W latent height and width, L tokens of a sample,
n tokens of this rank, D model width, M marks a sample gets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

from dmd_ds.wan.denoiser import WHOLE_SEQUENCE, ImageCondition, WanDenoiser, WholeSequence


def default_taps(layers: int) -> tuple[int, ...]:
    """Numbers of the blocks at a half, three quarters and the end of the model: structure, then detail."""
    return tuple(sorted({(layers * quarters + 3) // 4 - 1 for quarters in (2, 3, 4)}))


class TokenHead(nn.Module):
    """Judges every token by itself, from each tapped block: a norm and two layers, `M` = L x taps marks a sample."""

    def __init__(self, taps: int, width: int, hidden: int):
        super().__init__()
        self.judges = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in range(taps)
        )

    def forward(self, features: Sequence[torch.Tensor], sequence: WholeSequence, tokens: int) -> torch.Tensor:
        """Marks `[J, M]` in float32 of tapped features `[J, n, D]` each."""
        marks_JnM = torch.cat([judge(feature) for judge, feature in zip(self.judges, features, strict=True)], dim=2)
        return sequence.gather(marks_JnM.float(), tokens).flatten(1)


class ShrinkingAttention(nn.Module):
    """Halves a sequence by convolution and pooling, then lets it attend to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.convolution = nn.Conv1d(width, width, kernel_size=5, padding=2)
        self.norm, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x_JLD: torch.Tensor) -> torch.Tensor:
        x_JLD = halved(F.silu(self.convolution(x_JLD.transpose(1, 2)))).transpose(1, 2)
        q, k, v = self.to_qkv(self.norm(x_JLD)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_JLD = x_JLD + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_JLD + self.feed_forward(self.norm_after(x_JLD))


def halved(x_JDL: torch.Tensor) -> torch.Tensor:
    """Means of neighbours; of their maxima the gradient would jump with the rounding of a sum over ranks."""
    return F.avg_pool1d(x_JDL, 2, ceil_mode=True)


class ConvolutionHead(nn.Module):
    """Judges each sample as a whole: convolutions that shorten its tokens, attention, a mean; `M` = taps marks a sample.

    Sees all tokens at once, so every rank of a sample gathers them and does the same work.
    """

    def __init__(self, taps: int, width: int, hidden: int):
        super().__init__()
        heads = next(heads for heads in (8, 4, 2, 1) if hidden % heads == 0)
        self.judges = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width, elementwise_affine=False),
                    "shorten": nn.ModuleList(
                        nn.Conv1d(before, hidden, kernel_size=5, padding=2) for before in (width, hidden, hidden)
                    ),
                    "attend": nn.Sequential(*(ShrinkingAttention(hidden, heads) for _ in range(2))),
                    "decide": nn.Linear(hidden, 1),
                }
            )
            for _ in range(taps)
        )

    def forward(self, features: Sequence[torch.Tensor], sequence: WholeSequence, tokens: int) -> torch.Tensor:
        """Marks `[J, M]` in float32 of tapped features `[J, n, D]` each."""
        marks = []
        for judge, feature in zip(self.judges, features, strict=True):
            x_JDL = judge["norm"](sequence.gather(feature, tokens)).transpose(1, 2)
            for convolution in judge["shorten"]:
                x_JDL = halved(F.silu(convolution(x_JDL)))
            marks.append(judge["decide"](judge["attend"](x_JDL.transpose(1, 2)).mean(dim=1)))
        return torch.cat(marks, dim=1).float()


HEADS = {"token": TokenHead, "convolution": ConvolutionHead}


class Scores(NamedTuple):
    velocity_BCTHW: torch.Tensor
    marks_JM: torch.Tensor | None  # None where there is nothing to judge


class ScoreModel(WanDenoiser):
    """A denoiser with LoRA adapter and, where a GAN is asked for, a head that judges the features of the blocks in `taps`."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        sequence: WholeSequence = WHOLE_SEQUENCE,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
        taps: Sequence[int] = (),
        head: nn.Module | None = None,
    ):
        super().__init__(transformer, sequence, activation_checkpointing, activation_offload)
        self.taps = tuple(taps)
        self.head = head

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        prompt_embeds_BLD: torch.Tensor,
        adapter_weight_B: torch.Tensor | None = None,
        guidance_B: torch.Tensor | None = None,
        image: ImageCondition | None = None,
        judged: int = 0,
    ) -> Scores:
        """The velocity of every sample and the marks of the last `judged` of them; above 0 is taken for real."""
        taps = self.taps if judged else ()
        velocity_BCTHW, features = self.predict(x_BCTHW, sigma_B, prompt_embeds_BLD, adapter_weight_B, guidance_B, image, taps)
        if not judged:
            return Scores(velocity_BCTHW, None)
        tokens = velocity_BCTHW[0, 0].numel() // torch.Size(self.transformer.config.patch_size).numel()
        return Scores(velocity_BCTHW, self.head([feature[-judged:] for feature in features], self.sequence, tokens))

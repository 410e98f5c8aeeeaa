"""The Wan2.1 denoiser: diffusers' WanTransformer3DModel, driven block by block.

Driving the blocks ourselves is what lets one forward serve several scores (a LoRA weight a sample), checkpoint exactly the
blocks, trim the text, and spread a sample's tokens over ranks. Shape suffixes: B batch, C channels, T latent frames,
H W latent height and width, L tokens, n tokens of this rank, N heads, D width.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from dmd_ds.wan.guidance import takes_guidance

TEXT_TOKENS = 512  # Wan2.1 pads its text with zeros to this length, and attends to the padding
ADAPTER = "default"  # peft's name of it, in a generator as in a score model
ADAPTER_TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"


@dataclasses.dataclass(frozen=True)
class ImageCondition:
    """What an image-to-video model is shown beside the prompt. `dmd_ds.wan.image` makes it."""

    channels_BCTHW: torch.Tensor  # laid under the noised latents: which frames are given, and the VAE's latents of them
    embeds_BLD: torch.Tensor  # what CLIP sees in the picture

    def repeat(self, times: int) -> "ImageCondition":
        """For a batch that holds its samples so many times over."""
        return ImageCondition(self.channels_BCTHW.repeat(times, 1, 1, 1, 1), self.embeds_BLD.repeat(times, 1, 1))


def padding_bias(tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """Attention bias `[tokens]` under which trimmed text counts as the full 512 tokens; None where nothing is trimmed.

    All padding tokens are one vector, so m of them weigh in a softmax like one whose logit is raised by log m: the last
    of the trimmed tokens, a padding token, stands for itself and for all that were cut. Exact but for rounding: for fp32 only.
    """
    if tokens == TEXT_TOKENS:
        return None
    bias_L = torch.zeros(tokens, device=device, dtype=dtype)
    bias_L[-1] = math.log(TEXT_TOKENS - tokens + 1)
    return bias_L


class WholeSequence:
    """All tokens of a sample in one place, with no ranks about. `dmd_ds.parallel.attention.SequenceParallel` is the other kind."""

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of the tokens that lie along `dim`; a gradient comes back for all of them."""
        return x

    def gather(self, x_BnD: torch.Tensor, tokens: int) -> torch.Tensor:
        """All `tokens` of their samples, `[B, L, D]`."""
        return x_BnD

    def attention(self, q_BnND: torch.Tensor, k_BnND: torch.Tensor, v_BnND: torch.Tensor, tokens: int) -> torch.Tensor:
        """Attention of this rank's queries to all `tokens` of their samples, `[B, n, N, D]`."""
        return dispatch_attention_fn(q_BnND, k_BnND, v_BnND)


WHOLE_SEQUENCE = WholeSequence()


class Place(NamedTuple):
    """Where this rank's tokens stand in their sample: rotary embedding `[1, n, 1, D]`, and how many tokens there are in all."""

    cos: torch.Tensor
    sin: torch.Tensor
    tokens: int

    def rotate(self, x_BnND: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (Su et al. 2021) of queries or keys, on pairs of neighbouring channels."""
        even, odd = x_BnND[..., 0::2], x_BnND[..., 1::2]
        cos, sin = self.cos[..., 0::2], self.sin[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_BnND)


class SelfAttention:
    """Attention processor of the video tokens among themselves; `rotary_emb` is a `Place`."""

    def __init__(self, sequence: WholeSequence):
        self.sequence = sequence

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb: Place):
        query = rotary_emb.rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)))
        key = rotary_emb.rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        out = self.sequence.attention(query, key, value, rotary_emb.tokens)
        return attn.to_out[0](out.flatten(2, 3).type_as(query))


def attend_to_text(attn, query_BnND: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
    """`[B, n, N, D]`; the text may be trimmed to fewer than 512 tokens."""
    key = attn.norm_k(attn.to_k(text_BLD)).unflatten(2, (attn.heads, -1))
    value = attn.to_v(text_BLD).unflatten(2, (attn.heads, -1))
    bias_L = padding_bias(key.shape[1], query_BnND.device, query_BnND.dtype)
    mask = None if bias_L is None else bias_L.expand(query_BnND.shape[0], 1, query_BnND.shape[1], -1)
    return dispatch_attention_fn(query_BnND, key, value, attn_mask=mask)


class CrossAttention:
    """Attention processor of the video tokens to the text."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = attend_to_text(attn, query, encoder_hidden_states)
        return attn.to_out[0](out.flatten(2, 3).type_as(query))


class TextAndImage(NamedTuple):
    """What the blocks of an image-to-video model attend to; apart, so that neither needs to know the other's length."""

    text_BLD: torch.Tensor
    image_BLD: torch.Tensor


class TextAndImageAttention:
    """Attention processor of the video tokens to the text, plus that to the image; `encoder_hidden_states` is a `TextAndImage`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states: TextAndImage, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states.image_BLD)).unflatten(2, (attn.heads, -1))
        value = attn.add_v_proj(encoder_hidden_states.image_BLD).unflatten(2, (attn.heads, -1))
        out = attend_to_text(attn, query, encoder_hidden_states.text_BLD) + dispatch_attention_fn(query, key, value)
        return attn.to_out[0](out.flatten(2, 3).type_as(query))


class AdapterWeight:
    """How much of the LoRA adapter each sample sees: 1 is the fake score, 0 the real score, in one batch.

    The weight is set around each block's call, inside the function that activation checkpointing runs again, so that the
    recomputation sees what the forward saw.
    """

    def __init__(self, module: nn.Module):
        self.weight_B: torch.Tensor | None = None
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_B[ADAPTER].register_forward_hook(self._scale)

    def _scale(self, _module, _inputs, output_BLD):
        if self.weight_B is None:
            return output_BLD
        return output_BLD * self.weight_B.to(output_BLD.dtype).view(-1, 1, 1)

    @contextlib.contextmanager
    def __call__(self, weight_B: torch.Tensor | None):
        self.weight_B = weight_B
        try:
            yield
        finally:
            self.weight_B = None


class WanDenoiser(nn.Module):
    """Predicts the velocity of noised video latents, text to video or image to video as the transformer's weights are.

    `transformer`: the diffusers model, whose weights and names stay as they are.
    `sequence`: how the tokens of a sample are spread over ranks; latents come in and go out whole on each.
    `activation_checkpointing`: keep only each block's input for the backward and run the block again there.
    `activation_offload`: keep these inputs in the host's memory.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        sequence: WholeSequence = WHOLE_SEQUENCE,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
    ):
        super().__init__()
        self.transformer = transformer
        self.sequence = sequence
        self.activation_checkpointing = activation_checkpointing
        self.activation_offload = activation_offload
        self.adapter_weight: AdapterWeight | None = None
        for block in transformer.blocks:
            block.attn1.set_processor(SelfAttention(sequence))
            block.attn2.set_processor(CrossAttention() if transformer.config.image_dim is None else TextAndImageAttention())

    def add_adapter(self, rank: int, alpha: float) -> None:
        """Freezes the transformer and lays a LoRA adapter over every linear layer of its blocks (Hu et al. 2021)."""
        self.transformer.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTER_TARGETS)
        inject_adapter_in_model(config, self.transformer, adapter_name=ADAPTER)

    def weigh_adapter(self) -> None:
        """Makes `adapter_weight_B` an argument of the forward: a score model is two scores, a generator is one model."""
        self.adapter_weight = AdapterWeight(self.transformer)

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        prompt_embeds_BLD: torch.Tensor,
        adapter_weight_B: torch.Tensor | None = None,
        guidance_B: torch.Tensor | None = None,
        image: ImageCondition | None = None,
    ) -> torch.Tensor:
        """The velocity `[B, C, T, H, W]` in float32; the arguments are those of `predict`."""
        return self.predict(x_BCTHW, sigma_B, prompt_embeds_BLD, adapter_weight_B, guidance_B, image)[0]

    def predict(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        prompt_embeds_BLD: torch.Tensor,
        adapter_weight_B: torch.Tensor | None = None,
        guidance_B: torch.Tensor | None = None,
        image: ImageCondition | None = None,
        taps: Collection[int] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The velocity `[B, C, T, H, W]` in float32, and what the blocks numbered in `taps` give, `[B, n, D]` each.

        `x_BCTHW`: noised latents; `sigma_B`: noise level in [0, 1]; `prompt_embeds_BLD`: text padded with zeros to 512
        tokens, or trimmed to fewer of which the last is padding. `adapter_weight_B`: how much of the LoRA each sample
        sees (None: all of it). `guidance_B`: the guidance each sample asks for, for a guidance-embedded model and for no
        other; `image` likewise for an image-to-video model.
        """
        wan = self.transformer
        assert (image is None) == (wan.config.image_dim is None)
        assert (guidance_B is None) != takes_guidance(wan)
        p_t, p_h, p_w = wan.config.patch_size
        T, H, W = (size // patch for size, patch in zip(x_BCTHW.shape[2:], (p_t, p_h, p_w), strict=True))
        dtype = wan.patch_embedding.weight.dtype
        tokens = T * H * W

        cos, sin = (self.sequence.shard(table, dim=1) for table in wan.rope(x_BCTHW))
        place = Place(cos, sin, tokens)
        x_BCTHW = x_BCTHW.to(dtype)
        if image is not None:
            x_BCTHW = torch.cat([x_BCTHW, image.channels_BCTHW.to(dtype)], dim=1)
        # [B, C, T p_t, H p_h, W p_w] -> [B, C, p_t, p_h, n, p_w]: this rank's patches side by side, as one strip of video
        patches = x_BCTHW.unflatten(4, (W, p_w)).unflatten(3, (H, p_h)).unflatten(2, (T, p_t))
        patches = self.sequence.shard(patches.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6), dim=4)
        hidden_BnD = wan.patch_embedding(patches.flatten(4, 5)).flatten(2).transpose(1, 2).contiguous()
        embedder = wan.condition_embedder
        time_BD = embedder.time_embedder(embedder.timesteps_proj(1000.0 * sigma_B).to(dtype))
        if guidance_B is not None:
            time_BD = time_BD + embedder.guidance_embedder(embedder.timesteps_proj(1000.0 * guidance_B).to(dtype))
        modulation_B6D = embedder.time_proj(embedder.act_fn(time_BD)).unflatten(1, (6, -1))
        context = embedder.text_embedder(prompt_embeds_BLD.to(dtype))
        if image is not None:
            context = TextAndImage(context, embedder.image_embedder(image.embeds_BLD.to(dtype)))

        features = []
        for number, block in enumerate(wan.blocks):
            arguments = (block, hidden_BnD, context, modulation_B6D, place, adapter_weight_B)
            if self.activation_checkpointing and torch.is_grad_enabled():
                with save_on_cpu(pin_memory=True) if self.activation_offload else contextlib.nullcontext():
                    hidden_BnD = checkpoint(self._run_block, *arguments, use_reentrant=False)
            else:
                hidden_BnD = self._run_block(*arguments)
            if number in taps:
                features.append(hidden_BnD)

        shift_B1D, scale_B1D = (wan.scale_shift_table + time_BD[:, None].float()).chunk(2, dim=1)
        hidden_BnD = (wan.norm_out(hidden_BnD.float()) * (1 + scale_B1D) + shift_B1D).to(dtype)
        out_BLD = self.sequence.gather(wan.proj_out(hidden_BnD).float(), tokens)
        out = out_BLD.unflatten(1, (T, H, W)).unflatten(-1, (p_t, p_h, p_w, -1))
        # [B, T, H, W, p_t, p_h, p_w, C] -> [B, C, T p_t, H p_h, W p_w]
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3), features

    def _run_block(self, block, hidden_BnD, context, modulation_B6D, place, adapter_weight_B):
        with self.adapter_weight(adapter_weight_B) if self.adapter_weight else contextlib.nullcontext():
            return block(hidden_BnD, context, modulation_B6D, place)

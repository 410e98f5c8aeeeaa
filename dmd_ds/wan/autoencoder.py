"""The Wan VAE behind a few small functions: pixels [B, 3, T, H, W] in [-1, 1], latents [B, C, T', H', W'] of unit variance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch.utils.checkpoint import checkpoint

from dmd_ds.data.video import VideoSize
from dmd_ds.errors import UserError
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.original_parts import is_original

TIME_STRIDE, SPACE_STRIDE = 4, 8  # a latent frame stands for 4 frames, the first one for 1; a latent position for 8 x 8 pixels
DECODED_AT_ONCE = 4096  # latent positions: a dozen tiny clips together take a quarter of their time, a real one goes alone


def latents_shape(size: VideoSize, config: Mapping, where: str = "") -> tuple[int, int, int, int]:
    """`[C, T, H, W]` of a video's latents for a transformer of this configuration; `UserError`, begun with `where`, for a size
    that VAE or transformer cannot take."""
    if (size.frames - 1) % TIME_STRIDE:
        raise UserError(f"{where}frames={size.frames}: must be 4n + 1, the nearest is {(size.frames - 1) // 4 * 4 + 1}")
    for name, pixels, patch in (("height", size.height, config["patch_size"][1]), ("width", size.width, config["patch_size"][2])):
        stride = SPACE_STRIDE * patch
        if pixels % stride:
            nearest = max(stride, round(pixels / stride) * stride)
            raise UserError(f"{where}{name}={pixels}: must be a multiple of {stride}, the nearest is {nearest}")
    latent = (size.frames - 1) // TIME_STRIDE + 1, size.height // SPACE_STRIDE, size.width // SPACE_STRIDE
    return (config["out_channels"], *latent)


def load_autoencoder(folder: Path, device: torch.device) -> AutoencoderKLWan:
    vae = original_parts.autoencoder(folder) if is_original(folder) else diffusers_parts.autoencoder(folder / "vae")
    vae = vae.to(device).eval().requires_grad_(False)
    for kernel in vae.parameters():  # channels last: the convolutions take half the time on a CPU
        if kernel.ndim in (4, 5):
            last = torch.channels_last if kernel.ndim == 4 else torch.channels_last_3d
            kernel.data = kernel.data.contiguous(memory_format=last)
    return vae


def _mean_and_std(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def broadcast(values):
        return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, 1, 1, 1)

    return broadcast(vae.config.latents_mean), broadcast(vae.config.latents_std)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels_B3THW: torch.Tensor) -> torch.Tensor:
    """Latents as the denoiser sees them, float32; T must be 4n + 1, H and W multiples of 8."""
    latents = vae.encode(pixels_B3THW.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _mean_and_std(vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Videos, uint8 `[B, T, H, W, 3]` on the CPU."""
    mean, std = _mean_and_std(vae, latents_BCTHW)
    latents = (latents_BCTHW.float() * std + mean).to(vae.device, vae.dtype)
    parts = latents.split(max(1, DECODED_AT_ONCE // latents[0, 0].numel()))
    pixels = torch.cat([vae.decode(part).sample for part in parts]).float()
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


def decode_frames(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor, frames: Sequence[int] | None) -> torch.Tensor:
    """The frames of these numbers, or all, `[B, T, 3, H, W]` in [0, 1], with a gradient.

    The VAE is causal: nothing behind the last of the frames is decoded. Of each latent frame only what goes on to the next is kept
    for the backward, and it is decoded again there.
    """
    frames = range(TIME_STRIDE * (latents_BCTHW.shape[2] - 1) + 1) if frames is None else frames
    mean, std = _mean_and_std(vae, latents_BCTHW)
    needed = -(-max(frames) // TIME_STRIDE) + 1
    latents = (latents_BCTHW[:, :, :needed].float() * std + mean).to(vae.dtype)
    hidden = vae.post_quant_conv(latents)
    cache: list = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    parts = []
    for number in range(needed):
        part, cache = checkpoint(_decode_one, vae, hidden[:, :, number : number + 1], cache, number == 0, use_reentrant=False)
        parts.append(part)
    pixels_B3THW = torch.cat(parts, dim=2)[:, :, list(frames)].float().clamp(-1, 1)
    return ((pixels_B3THW + 1) / 2).transpose(1, 2)


def _decode_one(vae: AutoencoderKLWan, hidden_BC1HW: torch.Tensor, cache: list, is_first: bool) -> tuple[torch.Tensor, list]:
    """The pixels of one latent frame, and what its successor needs of it."""
    cache = list(cache)  # the decoder writes into it, and runs again from what it was
    return vae.decoder(hidden_BC1HW, feat_cache=cache, feat_idx=[0], first_chunk=is_first), cache

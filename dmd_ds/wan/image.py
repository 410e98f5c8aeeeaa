"""What an image-to-video model is shown of its first frame: CLIP's view of it, and the VAE's latents of it with grey behind."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from dmd_ds.data.latents import FirstFrame, LatentsDataset
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.autoencoder import TIME_STRIDE, encode
from dmd_ds.wan.denoiser import ImageCondition
from dmd_ds.wan.original_parts import is_original


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    processor: CLIPImageProcessorPil
    encoder: CLIPVisionModel


def load_image_encoder(folder: Path, device: torch.device) -> ImageEncoder:
    if is_original(folder):
        processor, encoder = original_parts.image_encoder(folder)
    else:
        processor = diffusers_parts.image_processor(folder / "image_processor")
        encoder = diffusers_parts.image_encoder(folder / "image_encoder")
    return ImageEncoder(processor, encoder.to(device).eval().requires_grad_(False))


@torch.no_grad()
def embed_image(image: ImageEncoder, picture_HW3: np.ndarray) -> torch.Tensor:
    """`[L, D]`, float32 on the CPU: the last but one hidden state of CLIP, for Wan2.1 257 tokens of 1280. The picture is uint8."""
    pixels = image.processor(images=Image.fromarray(picture_HW3), return_tensors="pt").pixel_values
    states = image.encoder(pixels.to(image.encoder.device, image.encoder.dtype), output_hidden_states=True).hidden_states
    return states[-2][0].float().cpu()


def show_first_frame(image: ImageEncoder, vae: AutoencoderKLWan, picture_HW3: np.ndarray, frames: int) -> FirstFrame:
    """The picture as the first of so many frames, uint8, at the video's size; float32 on the CPU."""
    first_3HW = torch.from_numpy(picture_HW3).permute(2, 0, 1).float() / 127.5 - 1
    pixels_3THW = first_3HW.new_zeros(3, frames, *first_3HW.shape[1:])
    pixels_3THW[:, 0] = first_3HW
    return FirstFrame(encode(vae, pixels_3THW[None])[0].cpu(), embed_image(image, picture_HW3))


def image_condition(frames: list[FirstFrame], device: torch.device) -> ImageCondition:
    """The batch of them, for the denoiser: a mask of the frames that are given, 4 to a latent one, and the latents."""
    latents_BCTHW = torch.stack([frame.latents for frame in frames]).to(device)
    mask_B4THW = latents_BCTHW.new_zeros(len(frames), TIME_STRIDE, *latents_BCTHW.shape[2:])
    mask_B4THW[:, :, 0] = 1  # the first latent frame is of one frame, which counts as four
    embeds_BLD = torch.stack([frame.embeds for frame in frames]).to(device)
    return ImageCondition(torch.cat([mask_B4THW, latents_BCTHW], dim=1), embeds_BLD)


def condition_of(dataset: LatentsDataset, indices: list[int], device: torch.device) -> ImageCondition | None:
    """What the samples are conditioned on beside their prompts: nothing in a text-to-video dataset."""
    if dataset.image_embeds_shape is None:
        return None
    return image_condition([dataset.first_frame(index) for index in indices], device)

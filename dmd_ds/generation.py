"""A diffusers Wan folder, teacher or student, and the videos it makes: for inference, evaluation and the demo alike."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from dmd_ds.data.latents import pad_embeds
from dmd_ds.data.video import VideoSize
from dmd_ds.errors import UserError, read_json, read_json_mapping
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Sampling, explain, validated
from dmd_ds.sampler import Velocity, few_step_schedule, few_step_x0, guided, scheduler_sample, with_steps
from dmd_ds.section import Positive, Section, Steps
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.autoencoder import decode, latents_shape, load_autoencoder
from dmd_ds.wan.denoiser import WHOLE_SEQUENCE, ImageCondition, WanDenoiser, WholeSequence
from dmd_ds.wan.guidance import takes_guidance
from dmd_ds.wan.image import image_condition, load_image_encoder, show_first_frame
from dmd_ds.wan.original_parts import is_original
from dmd_ds.wan.text import encode_prompts, load_text_encoder, padded_tokens
from dmd_ds.wan.weights import find_model, takes_image, transformer_config, transformer_tensors, whole_transformer

SETTINGS_FILE = "sampling.json"  # beside model_index.json, in the folders that this project writes


class Settings(Section):
    """How a model is sampled. The defaults are Wan2.1's own; a student's folder says what it was trained for."""

    steps: Steps = 50
    guidance: float = Field(5.0, ge=0, description="Ho and Salimans' scale; 1 is the conditional model alone")
    few_step: Sampling | None = Field(None, description="how a few-step student samples; None is the folder's own scheduler")
    frames: Positive = 81
    height: Positive = 480
    width: Positive = 832
    fps: float = Field(16, gt=0)

    @field_validator("few_step")
    @classmethod
    def check_few_step(cls, few_step: Sampling | None, info: ValidationInfo) -> Sampling | None:
        if few_step and info.data.get("steps", few_step.steps) != few_step.steps:
            raise PydanticCustomError("count", f"is of {few_step.steps} steps, but steps={info.data['steps']}")
        return few_step

    def changed(self, **given: float | None) -> "Settings":
        """These settings with those given that are not None; `UserError` for a value that cannot be.

        Another number of steps gives a few-step student another grid of its kind.
        """
        changes: dict = {key: value for key, value in given.items() if value is not None}
        try:
            if self.few_step and "steps" in changes:
                changes["few_step"] = with_steps(self.few_step, changes["steps"]).model_dump()
            return Settings.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            raise UserError(explain(error.errors()[0], Settings)) from error


def read_settings(folder: Path) -> Settings:
    """What the folder says of itself, or Wan2.1's own settings."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return Settings()
    return validated(Settings, read_json(path), str(path))


def write_settings(folder: Path, settings: Settings) -> None:
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=1) + "\n")


def load_scheduler(folder: Path) -> UniPCMultistepScheduler:
    """The folder's own scheduler, Wan2.1's UniPC; `UserError` for another, which would be read as what it is not."""
    if is_original(folder):
        return original_parts.scheduler()
    path = folder / "scheduler" / "scheduler_config.json"
    name = read_json_mapping(path).get("_class_name")
    if name != "UniPCMultistepScheduler":
        raise UserError(f"{path}: {name}, not Wan2.1's UniPCMultistepScheduler; a few-step student needs its {SETTINGS_FILE} beside it")
    return diffusers_parts.scheduler(folder / "scheduler")


def fingerprint(folder: Path) -> str:
    """Tells the weights of one folder from others, at the same path or not, without reading them whole."""
    files = sorted({tensor.file for tensor in transformer_tensors(folder).values()})
    return json.dumps([str(folder)] + [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def inference_dtype(device: torch.device) -> torch.dtype:
    """bf16 on accelerators, fp32 on the CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class VideoModel:
    """All parts of a folder, loaded. `sequence`: how the tokens of a sample are spread over ranks, which then sample together."""

    def __init__(self, path: str, device: torch.device, sequence: WholeSequence = WHOLE_SEQUENCE):
        self.folder = find_model(path)
        self.device = device
        self.settings = read_settings(self.folder)
        self.text = load_text_encoder(self.folder, device)
        self.vae = load_autoencoder(self.folder, device)
        self.image_encoder = load_image_encoder(self.folder, device) if takes_image(transformer_config(self.folder)) else None
        self.dtype = inference_dtype(device)
        transformer = whole_transformer(self.folder, self.dtype)
        self.denoiser = WanDenoiser(transformer, sequence).to(device).eval().requires_grad_(False)

    @property
    def takes_guidance(self) -> bool:
        return takes_guidance(self.denoiser.transformer)

    def evaluations(self, settings: Settings) -> int:
        """Forwards of the denoiser a video: guidance doubles them where it is not embedded."""
        return settings.steps * (1 if settings.guidance == 1.0 or self.takes_guidance else 2)

    def latents_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """`[C, T, H, W]` of the latents of a video of that size; `UserError` for a size the model cannot make."""
        return latents_shape(VideoSize(settings.frames, settings.height, settings.width), self.denoiser.transformer.config)

    def condition(self, pictures: list[np.ndarray], settings: Settings) -> ImageCondition:
        """What an image-to-video model is shown: a picture a video, uint8 `[height, width, 3]` of the settings' size."""
        frames = [show_first_frame(self.image_encoder, self.vae, picture, settings.frames) for picture in pictures]
        return image_condition(frames, self.device)

    @torch.no_grad()
    def latents(
        self, prompts: list[str], seeds: list[int], settings: Settings, negative_prompt: str = "", image: ImageCondition | None = None
    ) -> torch.Tensor:
        """Sampled latents `[B, C, T, H, W]`; each depends on its own prompt, image and seed alone, not on the batch."""
        if image is None and self.image_encoder is not None:
            raise UserError(f"{self.folder}: an image-to-video model, which needs an image a video")
        if image is not None and self.image_encoder is None:
            raise UserError(f"{self.folder}: a text-to-video model, which takes no image")
        shape = self.latents_shape(settings)
        *conditional, unconditional = encode_prompts(self.text, [*prompts, negative_prompt])
        tokens = padded_tokens(max(len(embed) for embed in [*conditional, unconditional]), self.dtype)

        guidance_B = torch.full((len(prompts),), settings.guidance, device=self.device) if self.takes_guidance else None

        def velocity(embeds: list[torch.Tensor]) -> Velocity:
            padded = pad_embeds(embeds, tokens).to(self.device)
            return lambda x, sigma_B: self.denoiser(x, sigma_B, padded, guidance_B=guidance_B, image=image)

        def noise(k: int) -> torch.Tensor:
            draws = [Randomness(seed).normal(f"sample/{k}", 0, [0], shape) for seed in seeds]
            return torch.cat(draws).to(self.device)

        field = velocity(conditional)
        if not self.takes_guidance:
            field = guided(field, velocity([unconditional] * len(prompts)), settings.guidance)
        if settings.few_step:
            return few_step_x0(field, noise, few_step_schedule(settings.few_step), settings.few_step.steps - 1)
        return scheduler_sample(field, load_scheduler(self.folder), settings.steps, noise(0))

    def videos(
        self, prompts: list[str], seeds: list[int], settings: Settings, negative_prompt: str = "", image: ImageCondition | None = None
    ) -> torch.Tensor:
        """uint8 `[B, T, H, W, 3]`."""
        return decode(self.vae, self.latents(prompts, seeds, settings, negative_prompt, image))

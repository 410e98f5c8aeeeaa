"""Looks at the generator while it trains: fixed prompts, fixed noise, mp4 files and a contact sheet."""

from pathlib import Path

import imageio.v3 as iio
import torch
from torch import nn

from dmd_ds.data.latents import LatentsDataset, pad_embeds
from dmd_ds.data.video import contact_sheet, write_video
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from dmd_ds.sampler import few_step_schedule, few_step_x0
from dmd_ds.wan.autoencoder import decode, load_autoencoder
from dmd_ds.wan.image import condition_of


class Validation:
    def __init__(self, recipe: Recipe, model: Path, dataset: LatentsDataset, prompt_tokens: int, guidance: float | None, mesh: Mesh):
        """`guidance`: what a guidance-embedded generator is asked for, None for another."""
        self.mesh = mesh
        self.fps = dataset.fps
        self.randomness = Randomness(recipe.seed)
        self.schedule = few_step_schedule(recipe.sampling)
        self.vae = load_autoencoder(model, mesh.device)
        self.shape, indices = next(iter(dataset.buckets().items()))
        chosen = [indices[i * len(indices) // recipe.validation.prompts] for i in range(recipe.validation.prompts)]
        # every rank samples the same number, the last ones again what others sampled: all make the same forwards
        each = -(-len(chosen) // mesh.data_size)
        self.mine = [place % len(chosen) for place in mesh.samples(each)]
        self.prompt_embeds = pad_embeds([dataset.prompt_embeds(chosen[i]) for i in self.mine], prompt_tokens).to(mesh.device)
        self.guidance_B = None if guidance is None else torch.full((len(self.mine),), guidance, device=mesh.device)
        self.image = condition_of(dataset, [chosen[i] for i in self.mine], mesh.device)

    @torch.no_grad()
    def sample(self, generator: nn.Module, folder: Path) -> None:
        """Writes one mp4 a prompt and contact_sheet.png into the folder; all ranks call it."""
        latents = few_step_x0(
            lambda x, sigma_B: generator(x, sigma_B, self.prompt_embeds, guidance_B=self.guidance_B, image=self.image),
            lambda k: self.randomness.normal(f"validation/{k}", 0, self.mine, self.shape, self.mesh.device),
            self.schedule,
            self.schedule.steps - 1,
        )
        videos = decode(self.vae, latents).numpy()
        gathered = self.mesh.gather_objects(dict(zip(self.mine, videos, strict=True)))
        if not self.mesh.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        by_place = {place: video for part in gathered for place, video in part.items()}
        ordered = [by_place[place] for place in sorted(by_place)]
        for place, video in enumerate(ordered):
            write_video(folder / f"{place:03d}.mp4", video, self.fps)
        iio.imwrite(folder / "contact_sheet.png", contact_sheet([[video] for video in ordered]))

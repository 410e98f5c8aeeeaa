"""Looks at the generator while it trains: fixed prompts and noise, trained weights and their average, beside the teacher and
the undistilled model.

Writes mp4 files and a contact sheet, and returns numbers: the judge's where the data is of moving shapes, the Fréchet distance
to a kept reference where there is one, and how far the videos have drifted from the teacher's own of the same prompts and noise.
Suffixes: B batch, C channels, T frames, H W height and width, L tokens, D text width, N videos, F features.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import nn

from dmd_ds.checkpoint import write_whole
from dmd_ds.data import moving_shapes
from dmd_ds.data.latents import LatentsDataset, pad_embeds
from dmd_ds.data.video import contact_sheet, read_video, write_video
from dmd_ds.distill.batch import Batch
from dmd_ds.drift import Measures, deviations, drift, mean_of, measure, outside
from dmd_ds.errors import UserError, read_json
from dmd_ds.generation import load_scheduler
from dmd_ds.parallel.ema import ShardedEMA
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe, find_file
from dmd_ds.sampler import Velocity, few_step_schedule, few_step_x0, guided, scheduler_sample
from dmd_ds.wan.autoencoder import decode, load_autoencoder
from dmd_ds.wan.image import condition_of

TRAINED, EMA, TEACHER, UNDISTILLED = "trained", "ema", "teacher", "undistilled"
TEACHER_FILE = "measures.json"
PROMPTS_FILE = "prompts.json"  # of the videos that are shown, in their order


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is kept of a video."""

    measures: Measures
    verdict: moving_shapes.Verdict | None  # where the captions are of moving shapes
    features_F: np.ndarray | None  # where there is a reference
    video_THW3: np.ndarray | None  # of those that are shown


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at the generator found, the same on every rank."""

    numbers: dict[str, float]  # for the log
    warnings: list[str]
    score: float | None  # by which checkpoints are compared, less is better; None where none is kept as the best


def check_validation(recipe: Recipe, model: Path) -> None:
    """`UserError` for what validation cannot do."""
    validation = recipe.validation
    if validation.reference is not None:
        if validation.prompts < 2:
            raise UserError(f"validation.prompts={validation.prompts}: a Fréchet distance to validation.reference takes at least 2")
        moving_shapes.read_features(find_file("validation.reference", validation.reference))
    if not recipe.is_few_step and not validation.teacher_steps:
        raise UserError(f"validation.teacher_steps=0: a generator of stage={recipe.stage} samples in as many steps as its teacher")
    if validation.teacher_steps:
        if recipe.stage != "reward":  # which is compared with its start
            load_scheduler(model)
    elif validation.keep_best and validation.reference is None:
        raise UserError("validation.keep_best=true compares by validation.reference or, with validation.teacher_steps, by drift; give one")


class Validation:
    def __init__(
        self,
        recipe: Recipe,
        model: Path,
        dataset: LatentsDataset,
        video: dict[str, float],
        shape: tuple[int, ...],
        prompt_tokens: int,
        guidance: float | None,
        two_pass_guidance: float,
        mesh: Mesh,
    ):
        """`video`, `shape`: what is made, frames, height and width, and latents `[C, T, H, W]`.

        `guidance`: what a guidance-embedded model is asked for, None for another; `two_pass_guidance`: the teacher's beside it.
        """
        self.recipe, self.model, self.dataset, self.mesh = recipe, model, dataset, mesh
        self.settings = recipe.validation
        self.prompt_tokens, self.guidance, self.two_pass_guidance = prompt_tokens, guidance, two_pass_guidance
        self.randomness = Randomness(recipe.seed)
        self.schedule = few_step_schedule(recipe.sampling)
        self.vae = load_autoencoder(model, mesh.device)
        self.video, self.shape = video, shape
        indices = dataset.buckets().get(shape, range(len(dataset)))  # any sample's prompt goes with a size that none has
        count = self.settings.prompts
        self.chosen = [indices[i * len(indices) // count] for i in range(count)]
        self.captions = [dataset.about[index]["caption"] for index in self.chosen]
        self.judges = moving_shapes.are_captions(about["caption"] for about in dataset.about)
        self.reference_NF = None
        if self.settings.reference is not None:
            self.reference_NF = moving_shapes.read_features(find_file("validation.reference", self.settings.reference))
        self.folder = Path(recipe.output_dir) / "samples"
        self.teacher: Measures | None = None
        self.kept: list[str] = []  # whose videos lie beside the student's

    # ---- sampling: every rank makes the same number of forwards ----

    def parts(self) -> Iterator[Batch]:
        """This rank's share of the videos, whose places among all of them key the noise.

        The last ranks make again what others make, so that all have as many.
        """
        each = -(-len(self.chosen) // self.mesh.data_size)
        mine = [place % len(self.chosen) for place in self.mesh.samples(each)]
        for start in range(0, each, self.settings.batch_size):
            places = mine[start : start + self.settings.batch_size]
            indices, device = [self.chosen[place] for place in places], self.mesh.device
            yield Batch(
                samples=places,
                prompts=[self.dataset.about[index]["caption"] for index in indices],
                prompt_embeds_BLD=pad_embeds([self.dataset.prompt_embeds(index) for index in indices], self.prompt_tokens).to(device),
                latents_shape=self.shape,
                latents_BCTHW=None,
                image=condition_of(self.dataset, indices, device),
                guidance_B=None if self.guidance is None else torch.full((len(places),), self.guidance, device=device),
            )

    def noise(self, part: Batch, k: int) -> torch.Tensor:
        return self.randomness.normal(f"validation/{k}", 0, part.samples, self.shape, self.mesh.device)

    def by_generator(self, generator: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """As it is trained to sample; one that is not trained for that samples as the teacher does."""

        def latents(part: Batch) -> torch.Tensor:
            sample = self.in_few_steps if self.recipe.is_few_step else self.as_teacher
            return sample(part, part.velocity_of(generator))

        return latents

    def in_few_steps(self, part: Batch, velocity: Velocity) -> torch.Tensor:
        return few_step_x0(velocity, lambda k: self.noise(part, k), self.schedule, self.schedule.steps - 1)

    def as_teacher(self, part: Batch, velocity: Velocity) -> torch.Tensor:
        return scheduler_sample(velocity, load_scheduler(self.model), self.settings.teacher_steps, self.noise(part, 0))

    def by_start(self, generator: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """By the generator as it was before rewards."""
        return lambda part: self.in_few_steps(part, part.start_velocity_of(generator))

    def by_teacher(self, score_model: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """By the score model's frozen base, guided, from the noise that the generator starts from."""
        negative_1LD = pad_embeds([self.dataset.negative_embeds_LD], self.prompt_tokens).to(self.mesh.device)

        def latents(part: Batch) -> torch.Tensor:
            conditional, unconditional = part.real_velocity_of(score_model), part.real_velocity_of(score_model, negative_1LD)
            return self.as_teacher(part, guided(conditional, unconditional, self.two_pass_guidance))

        return latents

    def by_undistilled(self, score_model: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """By the same base, sampled as the generator is: what the generator makes before its first step."""

        def latents(part: Batch) -> torch.Tensor:
            field = part.real_velocity_of(score_model)
            return few_step_x0(field, lambda k: self.noise(part, k), self.schedule, self.schedule.steps - 1)

        return latents

    @torch.no_grad()
    def see(self, latents: Callable[[Batch], torch.Tensor]) -> list[Seen]:
        """All the videos in order on the first rank, nothing elsewhere; every rank calls it."""
        mine: dict[int, Seen] = {}
        for part in self.parts():
            latents_BCTHW = latents(part)
            videos = decode(self.vae, latents_BCTHW).numpy()
            if self.mesh.leads_sample:
                for place, video, latents_CTHW in zip(part.samples, videos, latents_BCTHW, strict=True):
                    mine[place] = self.keep(place, video, latents_CTHW)
        gathered = self.mesh.gather_objects(mine)
        if gathered is None:
            return []
        by_place = {place: seen for some in gathered for place, seen in some.items()}
        return [by_place[place] for place in range(len(self.chosen))]

    def keep(self, place: int, video_THW3: np.ndarray, latents_CTHW: torch.Tensor) -> Seen:
        return Seen(
            measure(video_THW3, latents_CTHW),
            moving_shapes.judge(video_THW3) if self.judges else None,
            None if self.reference_NF is None else moving_shapes.features(video_THW3),
            video_THW3 if place < self.settings.shown else None,
        )

    # ---- the teacher and the undistilled model, once a run ----

    def meet_teacher(self, model: nn.Module) -> None:
        """Makes and measures the teacher's videos and the undistilled model's, or reads what was measured before.

        Every rank calls it, before the first look. Rewards have no teacher: what the generator made without its adapter takes
        that place.
        """
        made_for = {
            "model": self.recipe.model.path,
            "data": self.recipe.data.path,
            "seed": self.recipe.seed,
            "guidance": self.recipe.score.guidance,
            "video": self.video,
            "sampling": self.recipe.sampling.model_dump(mode="json"),
            **self.settings.model_dump(include={"prompts", "shown", "teacher_steps"}),
        }
        file = self.folder / TEACHER / TEACHER_FILE
        kept = read_json(file) if self.mesh.is_first and file.is_file() else None
        kept = self.mesh.all_gather_objects(kept)[0]  # what the first rank sees, all go by
        if kept is None or kept["made_for"] != made_for:
            seen = {TEACHER: self.see(self.by_start(model) if self.recipe.stage == "reward" else self.by_teacher(model))}
            if self.recipe.stage in ("dmd2", "regression"):
                seen[UNDISTILLED] = self.see(self.by_undistilled(model))
            if self.mesh.is_first:
                for name, videos in seen.items():
                    (self.folder / name).mkdir(parents=True, exist_ok=True)
                    for place, video in enumerate(shown(videos)):
                        write_video(self.folder / name / f"{place:03d}.mp4", video, self.dataset.fps)
                teacher = mean_of([one.measures for one in seen[TEACHER]])
                numbers = {name: self.numbers_of(videos, teacher) for name, videos in seen.items()}
                kept = {"made_for": made_for, "measures": dataclasses.asdict(teacher), "numbers": numbers}
                write_whole(file, json.dumps(kept, indent=1) + "\n")
            kept = self.mesh.all_gather_objects(kept)[0]
        self.kept = list(kept["numbers"])
        self.teacher = Measures(**{name: tuple(m) if isinstance(m, list) else m for name, m in kept["measures"].items()})

    def kept_videos(self, name: str) -> list[np.ndarray]:
        """The teacher's or the undistilled model's that are shown, as their files have them."""
        frames, height, width = (int(self.video[key]) for key in ("frames", "height", "width"))
        count = min(self.settings.shown, len(self.chosen))
        files = [self.folder / name / f"{place:03d}.mp4" for place in range(count)]
        return [read_video(file, frames, height, width, self.dataset.fps) for file in files]

    # ---- a look ----

    def look(self, generator: nn.Module, ema: ShardedEMA | None, folder: Path) -> Look:
        """Samples by the trained weights and by their average, writes the videos into the folder; every rank calls it."""
        seen = {TRAINED: self.see(self.by_generator(generator))}
        if ema:
            with ema.in_place():
                seen[EMA] = self.see(self.by_generator(generator))
        look = None
        if self.mesh.is_first:
            look = self.judge(seen)
            self.show(seen, folder)
        return self.mesh.all_gather_objects(look)[0]

    def judge(self, seen: dict[str, list[Seen]]) -> Look:
        """The student is the average where there is one: it is watched, and by it checkpoints are compared."""
        numbers, warnings, score = {}, [], None
        for name, videos in seen.items():
            found = self.numbers_of(videos, self.teacher)
            if self.teacher:
                off = {what.removeprefix("drift_"): share for what, share in found.items() if what.startswith("drift_")}
                left = outside(off, self.settings.drift_band)
                warnings = [f"{what} of the {name} weights' videos is {share:+.0%} off the teacher's" for what, share in left.items()]
            score = found.get("frechet", found.get("drift"))
            numbers |= {f"validation/{name}/{what}": number for what, number in found.items()}
        warnings = [f"{warning}, validation.drift_band is {self.settings.drift_band:.0%}" for warning in warnings]
        return Look(numbers, warnings, score if self.settings.keep_best else None)

    def numbers_of(self, videos: list[Seen], teacher: Measures | None) -> dict[str, float]:
        """What is measured of a set of videos; `teacher`: what the drift is from."""
        found: dict[str, float] = {}
        if self.judges:
            found |= moving_shapes.score([one.verdict for one in videos], self.captions)
        if teacher:
            off = deviations(mean_of([one.measures for one in videos]), teacher)
            found |= {f"drift_{what}": share for what, share in off.items()} | {"drift": drift(off)}
        if self.reference_NF is not None:
            found["frechet"] = moving_shapes.frechet_distance(np.stack([one.features_F for one in videos]), self.reference_NF)
        return {what: float(number) for what, number in found.items()}

    def show(self, seen: dict[str, list[Seen]], folder: Path) -> None:
        columns = {name: self.kept_videos(name) for name in self.kept}
        columns |= {name: shown(videos) for name, videos in seen.items()}
        if not columns[TRAINED]:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / PROMPTS_FILE, json.dumps(self.captions[: len(columns[TRAINED])], indent=1) + "\n")
        for name in seen:
            for place, video in enumerate(columns[name]):
                write_video(folder / f"{place:03d}_{name}.mp4", video, self.dataset.fps)
        iio.imwrite(folder / "contact_sheet.png", contact_sheet([list(row) for row in zip(*columns.values(), strict=True)]))


def shown(videos: list[Seen]) -> list[np.ndarray]:
    return [one.video_THW3 for one in videos if one.video_THW3 is not None]

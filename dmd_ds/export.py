"""A trained generator in the formats that others load: diffusers, original Wan2.1, ComfyUI; `dmd_ds.lora` makes LoRA files.

From a ZeRO-3 checkpoint of any number of ranks, one tensor at a time. Each makes a folder with a model card in it, under
its final name only when it is whole.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import diffusers
import torch
from safetensors import SafetensorError

from dmd_ds import checkpoint
from dmd_ds.errors import UserError
from dmd_ds.generation import SETTINGS_FILE, Settings, load_scheduler, read_settings, write_settings
from dmd_ds.recipe import Recipe, Sampling, load_recipe
from dmd_ds.sampler import few_step_schedule, few_step_scheduler, nearest_stock, timesteps_apart
from dmd_ds.shards import Shards
from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.denoiser import ADAPTER, ADAPTER_TARGETS
from dmd_ds.wan.guidance import FOLDED_INTO, folded_bias, has_guidance_embedding
from dmd_ds.wan.image import load_image_encoder
from dmd_ds.wan.original import GUIDANCE, original_config, to_original
from dmd_ds.wan.original_parts import is_original
from dmd_ds.wan.tensors import Spec, Stored, save_weights, write_safetensors
from dmd_ds.wan.text import load_text_encoder
from dmd_ds.wan.weights import find_model, takes_image, transformer_config, transformer_tensors

PREFIX = "transformer."  # WanDenoiser's name for the diffusers model
ADAPTED = re.compile(rf"({ADAPTER_TARGETS})\.(weight|bias)")


def adapter_names(name: str) -> tuple[str, str]:
    """What the two matrices A and B of the adapter over this one are called in a checkpoint."""
    module = f"{PREFIX}{name.removesuffix('.weight')}"
    return f"{module}.lora_A.{ADAPTER}.weight", f"{module}.lora_B.{ADAPTER}.weight"


@dataclasses.dataclass(frozen=True)
class Student:
    """A checkpoint's generator and what it was trained from; tensors go by diffusers' names.

    A generator that was trained as LoRA is its base with the adapter merged in: W + scale alpha / rank B A.
    """

    recipe: Recipe
    state: checkpoint.State
    base: Path
    base_tensors: dict[str, Stored]
    weights: Shards
    guidance: float | None = None  # folded into the time embedding, None where nothing was
    lora_scale: float = 1.0  # of the adapter: 0 is the base, 1 is as trained

    @property
    def names(self) -> list[str]:
        trained = [name.removeprefix(PREFIX) for name in self.weights.shapes if f".{ADAPTER}." not in name]
        names = list(dict.fromkeys([*trained, *self.base_tensors]))
        return names if self.guidance is None else [name for name in names if not name.startswith(GUIDANCE)]

    @property
    def takes_guidance(self) -> bool:
        return has_guidance_embedding(self.names)

    @property
    def specs(self) -> dict[str, Spec]:
        """Its tensors, stored in the types of the base model's; a fresh guidance embedding in that of the time embedding."""
        base, like = self.base_tensors, self.base_tensors[FOLDED_INTO]
        shapes = {name: tensor.shape for name, tensor in base.items()}
        return {name: Spec(shapes.get(name) or self.weights.shapes[PREFIX + name], base.get(name, like).dtype) for name in self.names}

    @property
    def adapted(self) -> list[str]:
        """The matrices that an adapter lies over; none where all weights were trained."""
        return [name for name in self.base_tensors if adapter_names(name)[0] in self.weights.shapes]

    def read_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A `[r, in]`, B `[out, r]`) over the matrix of this name, fp32 as trained."""
        A, B = adapter_names(name)
        return self.weights.read(A), self.weights.read(B)

    def folded(self, guidance: float | None = None) -> "Student":
        """The stock Wan2.1 that this student is at one guidance, by default the one it was trained at; itself without an embedding."""
        if not self.takes_guidance:
            return self
        return dataclasses.replace(self, guidance=self.recipe.score.guidance if guidance is None else guidance)

    @property
    def settings(self) -> Settings:
        """How it is sampled: as it was trained, without guidance beside its own."""
        sampling = self.recipe.sampling
        steps, few_step = (sampling.steps, sampling) if self.recipe.is_few_step else (read_settings(self.base).steps, None)
        guidance = self.recipe.score.guidance if self.takes_guidance else 1.0
        return Settings(steps=steps, guidance=guidance, few_step=few_step, **self.state.video)

    def scaled(self, lora_scale: float) -> "Student":
        """With so much of its adapter; `UserError` where it was not trained as one."""
        if self.recipe.generator.lora_rank is None:
            raise UserError(f"{self.weights.folder}: was not trained as LoRA (generator.lora_rank is null), it has no scale")
        return dataclasses.replace(self, lora_scale=lora_scale)

    def read(self, name: str) -> torch.Tensor:
        if name == FOLDED_INTO and self.guidance is not None:
            return folded_bias(self.read_trained, self.guidance)
        return self.read_trained(name)

    def read_trained(self, name: str) -> torch.Tensor:
        """The tensor with what training made of it and no guidance folded in, fp32."""
        if PREFIX + name in self.weights.shapes:
            return self.weights.read(PREFIX + name)
        weight = self.base_tensors[name].read().float()
        if adapter_names(name)[0] in self.weights.shapes:
            A, B = self.read_adapter(name)
            weight += self.lora_scale * self.recipe.generator.lora_alpha / len(A) * (B @ A)
        return weight

    def read_base(self, name: str) -> torch.Tensor:
        """The base's tensor, with the same guidance folded into it."""
        if name == FOLDED_INTO and self.guidance is not None and has_guidance_embedding(self.base_tensors):
            return folded_bias(lambda name: self.base_tensors[name].read(), self.guidance).float()
        return self.base_tensors[name].read().float()


def find_student(source: Path, model: str | None = None, weights: Literal["ema", "trained"] | None = None) -> Student:
    """Of a run's folder (its newest checkpoint) or of one checkpoint; `model` where the base is not at its old path any more.

    `weights`: the average of the trained ones or these themselves; by default the average where there is one.
    """
    folder = checkpoint.find(source)
    average = folder / checkpoint.EMA
    if weights == "ema" and not average.is_dir():
        raise UserError(f"{folder}: holds no average of weights; it was trained without generator.ema_decay")
    averaged = average.is_dir() and weights != "trained"
    recipe = load_recipe(str(folder / checkpoint.RECIPE))
    base = find_model(model or recipe.model.path)
    weights_folder = average if averaged else folder / "generator"
    checkpoint.check_files(folder, [name for name in checkpoint.read_manifest(folder) if name.startswith(f"{weights_folder.name}/")])
    found, base_tensors = Shards(weights_folder), transformer_tensors(base)
    check_fits(weights_folder, found, base, base_tensors, recipe)
    return Student(recipe, checkpoint.read_state(folder), base, base_tensors, found)


def check_fits(folder: Path, weights: Shards, base: Path, base_tensors: dict[str, Stored], recipe: Recipe) -> None:
    """`UserError` unless the checkpoint holds what the recipe trains over this base, and a fresh guidance embedding or none."""
    expected = {PREFIX + name: tensor.shape for name, tensor in base_tensors.items()}
    rank = recipe.generator.lora_rank
    if rank is not None:
        matrices = {name: tensor.shape for name, tensor in base_tensors.items() if ADAPTED.fullmatch(name) and len(tensor.shape) == 2}
        pairs = {name: ((rank, columns), (rows, rank)) for name, (rows, columns) in matrices.items()}
        expected = {key: shape for name, pair in pairs.items() for key, shape in zip(adapter_names(name), pair, strict=True)}
    strange = expected.keys() ^ weights.shapes.keys()
    if not has_guidance_embedding(base_tensors):
        strange = {name for name in strange if not name.startswith(PREFIX + GUIDANCE)}
    if strange:
        raise UserError(f"{folder}: its tensors are not those of {base}; {min(strange)} is in one of them only")
    for name, shape in expected.items():
        if weights.shapes[name] != shape:
            raise UserError(f"{folder}: {name} is {list(weights.shapes[name])}, over {base} it would be {list(shape)}")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written and vanishes when it cannot be."""
    if out.exists():
        raise UserError(f"{out}: exists already; name another folder or remove it")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(out)
    except shutil.Error as error:  # of copying several files, of which the first that failed is told
        _, copy, reason = error.args[0][0]
        raise UserError(f"{out}: {Path(copy).name} cannot be written: {reason}") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    except SafetensorError as error:  # of the parts that diffusers writes
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def pipeline_class(base: Path) -> str:
    return "WanImageToVideoPipeline" if takes_image(transformer_config(base)) else "WanPipeline"


def list_timesteps(sampling: Sampling) -> str:
    """What the model is told of the noise levels, 1000 for pure noise."""
    return ", ".join(f"{1000 * float(told):.4g}" for told in few_step_schedule(sampling).told)


def sampling_note(sampling: Sampling) -> str:
    """What the scheduler of the exported folder does otherwise than training, in one line; empty where it does the same."""
    nearest = nearest_stock(sampling)
    apart = timesteps_apart(sampling, nearest)
    if apart < 1e-3:
        return ""
    last_sigma = "null" if nearest.last_sigma is None else f"{nearest.last_sigma:.4g}"
    return (
        f"No scheduler of stock diffusers samples it as it was trained. The folder's own is the nearest: timesteps "
        f"{list_timesteps(nearest)}, up to {apart:.3g} away, which is sampling.grid=stretched sampling.shift={nearest.shift:.4g} "
        f"sampling.last_sigma={last_sigma}. As trained it is sampled by {SETTINGS_FILE} and inference/generate.py of dmd_ds."
    )


def model_card(student: Student, use: str) -> str:
    task = {"WanPipeline": "text-to-video", "WanImageToVideoPipeline": "image-to-video"}[pipeline_class(student.base)]
    folded = "" if student.guidance is None else f"Its guidance embedding is folded at {student.guidance}.\n"
    scaled = "" if student.lora_scale == 1.0 else f"Its adapter is scaled by {student.lora_scale}.\n"
    return f"""---
library_name: diffusers
pipeline_tag: {task}
---
# {student.base.name}, {title(student)}

{training(student)}
{folded}{scaled}

{use}

{as_sampled(student)} The base model's licence holds for this one.
"""


def title(student: Student) -> str:
    recipe = student.recipe
    if not recipe.is_few_step:
        return "guided in one pass"
    return f"distilled to {recipe.sampling.steps} steps" if recipe.stage != "reward" else "trained on rewards"


def training(student: Student) -> str:
    """What was done to the base."""
    recipe, steps = student.recipe, student.state.step
    from_what = f"by dmd_ds from {recipe.model.path}; data {recipe.data.path}; {steps}"
    built_in = f"the teacher's guidance of {recipe.score.guidance} is built in."
    if recipe.stage == "cfg_distill":
        asked = recipe.cfg_distill
        return f"Guidance of {asked.guidance_min:g} to {asked.guidance_max:g} distilled into one pass {from_what} updates."
    if recipe.stage == "regression":
        return f"Distilled by regression to {recipe.regression.target} {from_what} updates; {built_in}"
    if recipe.stage == "reward":
        rewards = ", ".join(f"{term.weight:g} {name}" for name, term in recipe.reward.rewards.items())
        return f"Trained on rewards ({rewards}; {recipe.reward.penalty:g} penalty) {from_what} updates."
    return f"""Distilled with DMD2 {from_what} fake-score updates,
a generator update every {recipe.fake_score.updates_per_generator_update}; {built_in}"""


def as_sampled(student: Student) -> str:
    sampling, video = student.recipe.sampling, student.state.video
    size = f"Trained on {video['frames']} frames of {video['width']}x{video['height']}"
    if not student.recipe.is_few_step:
        return f"{size}; sampled as its base, in half as many evaluations."
    step = {"sde": "noised afresh between them", "ode": "by Euler's steps along the velocity, without noise between them"}[sampling.solver]
    return f"""{size}: sampled in {sampling.steps} steps, without guidance,
at the timesteps {list_timesteps(sampling)}, {step}."""


def copy_other_parts(base: Path, folder: Path) -> None:
    """All of a diffusers pipeline but the transformer and the scheduler, of a base in either layout."""
    if not is_original(base):
        ours = {"transformer", "scheduler", "README.md"}
        shutil.copytree(base, folder, ignore=lambda where, names: ours & set(names), dirs_exist_ok=True)
        return
    cpu = torch.device("cpu")
    text = load_text_encoder(base, cpu)
    parts = {"tokenizer": text.tokenizer, "text_encoder": text.encoder, "vae": load_autoencoder(base, cpu)}
    if takes_image(transformer_config(base)):
        image = load_image_encoder(base, cpu)
        parts |= {"image_encoder": image.encoder, "image_processor": image.processor}
    kind = getattr(diffusers, pipeline_class(base))  # by name: importing the image-to-video one warns without torchvision
    kind(**parts, transformer=None, scheduler=None).save_pretrained(folder)


def to_diffusers(student: Student, out: Path, largest_file: int = 5 * 10**9) -> None:
    """A whole diffusers pipeline, whose scheduler samples as the student was trained, or as near to it as a stock one can.

    In the second case the model card says so. A guidance embedding is folded, but for one that was all that was to be learnt:
    that folder is a model for this project, which is told its guidance.
    """
    recipe = student.recipe
    if recipe.is_few_step:
        student = student.folded()
    with whole_folder(out) as folder:
        copy_other_parts(student.base, folder)
        (folder / "transformer").mkdir()
        config = transformer_config(student.base)
        (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_weights(folder / "transformer", student.specs, student.read, largest_file)
        scheduler = few_step_scheduler(nearest_stock(recipe.sampling)) if recipe.is_few_step else load_scheduler(student.base)
        scheduler.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = pipeline_class(student.base)
        index["transformer"] = ["diffusers", "WanTransformer3DModel"]
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_settings(folder, student.settings)
        (folder / "README.md").write_text(model_card(student, use_of_pipeline(student)))


def use_of_pipeline(student: Student) -> str:
    video, sampling, pipeline = student.state.video, student.recipe.sampling, pipeline_class(student.base)
    if student.takes_guidance:
        return (
            "It is told its guidance, which stock diffusers cannot do: sample it, or go on from it, with dmd_ds.\n"
            "`tools/convert_wan.py --fold-guidance W` makes it stock."
        )
    size = f"height={video['height']}, width={video['width']}, num_frames={video['frames']}"
    takes = {"WanPipeline": "prompt", "WanImageToVideoPipeline": "image, prompt"}[pipeline]
    use = f"""    import torch
    from diffusers import {pipeline}

    pipeline = {pipeline}.from_pretrained(FOLDER)
    video = pipeline({takes}, num_inference_steps={student.settings.steps}, guidance_scale=1.0, {size}).frames[0]"""
    note = sampling_note(sampling)
    return f"{use}\n\n{note}" if note else use


def to_wan(student: Student, out: Path, largest_file: int = 5 * 10**9) -> None:
    """The denoiser as an original Wan2.1 folder has it: config.json and weights under the original names, a guidance embedding's too."""
    names = {to_original(name): name for name in student.specs}
    with whole_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(original_config(transformer_config(student.base)), indent=2) + "\n")
        specs = {new: student.specs[name] for new, name in names.items()}
        save_weights(folder, specs, lambda new: student.read(names[new]), largest_file)
        (folder / "README.md").write_text(model_card(student, "Put these files in the place of those of the original folder."))


def to_comfyui(student: Student, out: Path) -> None:
    """One file under the original names, for ComfyUI's models/diffusion_models. Stock: a guidance embedding is folded."""
    student = student.folded()
    names = {to_original(name): name for name in student.specs}
    with whole_folder(out) as folder:
        specs = {new: student.specs[name] for new, name in names.items()}
        write_safetensors(folder / f"{out.name}.safetensors", specs, (student.read(name) for name in names.values()))
        (folder / "README.md").write_text(model_card(student, f"Put {out.name}.safetensors into ComfyUI/models/diffusion_models."))

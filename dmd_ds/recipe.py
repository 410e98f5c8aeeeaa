"""The recipe of a run: typed, checked before anything is built. Defaults <- YAML <- `key=value` from the command line."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dmd_ds.errors import UserError

PACKAGE = Path(__file__).parent
REPOSITORY = PACKAGE.parent

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Sigma = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    path: str = Field(
        description="a Wan2.1 folder, diffusers' or an original one, a hub name, or the name of one that ships in dmd_ds/assets"
    )
    guidance_embedding: bool = Field(False, description="gives a model that has none a guidance embedding, without effect at first")


class Data(Section):
    path: str = Field(description="a latents dataset made by tools/encode_videos.py, or the name of one in dmd_ds/assets")
    batch_size: Positive = Field(1, description="samples a rank and step")


class Parallel(Section):
    """How a sample's tokens are spread; the ranks of one sample sit on one machine. What is left over goes to data."""

    ulysses: Positive = Field(1, description="ranks that share a sample by attention heads; divides their number")
    ring: Positive = Field(1, description="times so many ranks that pass keys and values around")
    join_timeout: Annotated[float, Field(gt=0)] = Field(300.0, description="seconds to wait for all ranks at the start")


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: NotNegative = Field(0, description="optimiser steps over which the learning rate grows to its full value")
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ds_config: str = Field(description="DeepSpeed JSON, a path from here or from the project's folder")


class Generator(Optimizer):
    ds_config: str = "ds_configs/generator_zero3.json"
    lora_rank: Positive | None = Field(None, description="trains a LoRA adapter of this rank instead of all weights; null: all weights")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(128.0, description="the adapter is scaled by lora_alpha / lora_rank")


class FakeScore(Optimizer):
    ds_config: str = "ds_configs/fake_score_zero3.json"
    updates_per_generator_update: Positive = 5
    lora_rank: Positive = 128
    lora_alpha: Annotated[float, Field(gt=0)] = Field(128.0, description="the adapter is scaled by lora_alpha / lora_rank")


class Score(Section):
    """The noise levels at which real and fake score look at a sample."""

    guidance: Annotated[float, Field(ge=0)] = Field(
        5.0, description="classifier-free guidance of the real score, Ho and Salimans' scale: 1 is the conditional model alone"
    )
    shift: Annotated[float, Field(gt=0)] = 5.0
    sigma_min: Sigma = 0.02
    sigma_max: Sigma = 0.98


class Sampling(Section):
    """The generator's grid of noise levels: the one that a stock FlowMatchEulerDiscreteScheduler of these numbers makes."""

    steps: Positive = 4
    shift: Annotated[float, Field(gt=0)] = 5.0
    last_sigma: Rate | None = Field(0.625, description="noise level of the last step, the grid is stretched to it; none at 1 step")


class Validation(Section):
    every: NotNegative = Field(500, description="steps between two looks at the generator; 0 is never")
    prompts: Positive = Field(4, description="how many of the dataset's captions are sampled")


class Recipe(Section):
    stage: Literal["dmd2"] = "dmd2"
    output_dir: str
    max_steps: NotNegative
    save_every: Positive = 500
    seed: int = 0
    activation_checkpointing: bool = True
    activation_offload: bool = Field(False, description="what checkpointing keeps, each block's input, is kept in the host's memory")
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    generator: Generator
    fake_score: FakeScore
    score: Score = Score()
    sampling: Sampling = Sampling()
    validation: Validation = Validation()

    @field_validator("activation_offload")
    @classmethod
    def _needs_checkpointing(cls, offload: bool, before: ValidationInfo) -> bool:
        if offload and not before.data.get("activation_checkpointing", True):
            raise ValueError("needs activation_checkpointing=true: only what checkpointing keeps is moved")
        return offload


# ---- reading ----------------------------------------------------------------------------------------------------------


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or the YAML file itself."""
    shipped = PACKAGE / "recipes" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    raise UserError(f"recipe {name!r} is neither a YAML file nor one that ships ({', '.join(shipped)}){nearest(name, shipped)}")


def nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def load_recipe(name: str, overrides: list[str] = ()) -> Recipe:
    """The recipe of a shipped name or YAML file, with `key=value` overrides; `UserError` names the file and the key."""
    path = find_recipe(name)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, not a {type(tree).__name__}")
    for override in overrides:
        set_key(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error.errors()[0])}") from error


def set_key(tree: dict[str, Any], override: str) -> None:
    """Writes `a.b=value` into a nested dict; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not of the form key=value")
    *sections, leaf = key.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not readable as YAML") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-5 as text: it wants a dot and a sign
    tree[leaf] = value


def explain(problem: dict[str, Any]) -> str:
    """One line for one pydantic problem."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, known_keys())}"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


# ---- what it names on disk --------------------------------------------------------------------------------------------


def find_folder(key: str, path: str, holding: str) -> Path:
    """The folder a recipe's key names: from here, or one that ships in dmd_ds/assets. It must hold the named file."""
    for folder in (Path(path), PACKAGE / "assets" / path):
        if (folder / holding).is_file():
            return folder
    if Path(path).is_dir():
        raise UserError(f"{key}={path}: no {holding} in that folder")
    raise UserError(f"{key}={path}: no such folder, here or in {PACKAGE.name}/assets")


def find_ds_config(key: str, path: str) -> Path:
    for file in (Path(path), REPOSITORY / path):
        if file.is_file():
            return file
    raise UserError(f"{key}={path}: no such file")

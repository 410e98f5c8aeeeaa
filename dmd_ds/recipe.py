"""The recipe of a run: typed, checked before anything is built. Defaults <- YAML <- `key=value` from the command line."""

import difflib
import itertools
import os
import re
import reprlib
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dmd_ds.errors import UserError, read_text
from dmd_ds.section import NotNegative, Positive, Rate, Section, Seed, Sigma, SizeText, Steps, Timesteps
from dmd_ds.stages import CfgDistill, Gan, Regression, Reward, Rollout

PACKAGE = Path(__file__).parent
SHORT = reprlib.Repr()  # of values in messages: aliases in YAML make a few bytes into gigabytes of text
SHORT.maxdict = SHORT.maxlist = SHORT.maxtuple = 16
SHORT.maxstring = SHORT.maxother = 200
SHORT.maxlevel = 3
REPOSITORY = PACKAGE.parent
INSTALLED = Path(sys.prefix) / "share" / "dmd_ds"  # where `pip install .` puts ds_configs

AnySection = TypeVar("AnySection", bound=BaseModel)


class Model(Section):
    path: str = Field(
        description="a Wan2.1 folder, diffusers' or an original one, a hub name, or the name of one that ships in dmd_ds/assets"
    )
    guidance_embedding: bool = Field(False, description="gives a model that has none a guidance embedding, without effect at first")


class Data(Section):
    path: str = Field(description="a latents dataset made by tools/encode_videos.py, or the name of one in dmd_ds/assets")
    batch_size: Positive = Field(1, description="samples a rank and backward pass")
    sizes: list[SizeText] | None = Field(
        None,
        min_length=1,
        description="frames x height x width, one drawn a step; the dataset's own by default, which a GAN, data and images need",
    )
    accumulation: Positive = Field(1, description="backward passes a step, whose gradients are averaged")


class Parallel(Section):
    """How a sample's tokens are spread; the ranks of one sample sit on one machine. What is left over goes to data, weights to all."""

    ulysses: Positive = Field(1, description="ranks that share a sample by attention heads; divides their number")
    ring: Positive = Field(1, description="times so many ranks that pass keys and values around")
    gather: Literal["each", "rollout", "update"] = Field(
        "rollout",
        description="each: every forward and backward brings a block's weights together as it comes to it, least memory; rollout: the "
        "generator's stay whole for all forwards of a rollout; update: and each model's from the forward to its backward",
    )
    join_timeout: Annotated[float, Field(gt=0)] = Field(300.0, description="seconds to wait for all ranks at the start")
    hang_timeout: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="seconds without progress after which the run ends and names the rank that stands; more than validation takes"
    )


DsConfig = Annotated[str, Field(description="DeepSpeed JSON, a path from here or from the project's folder")]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    lr: float = Field(gt=0, description="learning rate")
    betas: tuple[Beta, Beta] = Field((0.0, 0.999), description="of Adam's two averages; 0 for the first is no momentum")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW's")
    warmup_steps: NotNegative = Field(0, description="optimiser steps over which the learning rate grows to its full value")
    cooldown_steps: NotNegative = Field(0, description="the last optimiser steps of max_steps, over which it falls to nothing")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="a longer gradient, of all weights together, is scaled to it")
    ds_config: DsConfig


class Generator(Optimizer):
    ds_config: DsConfig = "ds_configs/generator_zero3.json"
    lora_rank: Positive | None = Field(None, description="trains a LoRA adapter of this rank instead of all weights; null: all weights")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(128.0, description="the adapter is scaled by lora_alpha / lora_rank")
    ema_decay: Rate | None = Field(None, description="of a moving average of its weights, an update; the average is then the student")


class FakeScore(Optimizer):
    ds_config: DsConfig = "ds_configs/fake_score_zero3.json"
    updates_per_generator_update: Positive = Field(5, description="fake-score updates, a step each, for one of the generator")
    lora_rank: Positive = Field(128, description="of the adapter that makes the fake score of the real one")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(128.0, description="the adapter is scaled by lora_alpha / lora_rank")


class Score(Section):
    """The noise levels at which real and fake score look at a sample."""

    guidance: Annotated[float, Field(ge=0)] = Field(
        5.0, description="classifier-free guidance of the real score, Ho and Salimans' scale: 1 is the conditional model alone"
    )
    guidance_below: Sigma = Field(1.0, description="noise level up to which it is guided; above, where videos take their layout, it is not")
    shift: Annotated[float, Field(gt=0)] = Field(5.0, description="moves the levels, drawn evenly, towards 1; at 1 they stay even")
    above_exit: bool = Field(
        False, description="draws no level below the one to which sampling goes on from the exit step; from the last step that is 0"
    )
    sigma_min: Sigma = Field(0.02, description="a level drawn below is raised to it")
    sigma_max: Sigma = Field(0.98, description="a level drawn above is lowered to it")
    normaliser: bool = Field(True, description="divides the gradient by how far the real score is from the sample (DMD, eq. 8)")


class Sampling(Section):
    """How the generator samples, in training and after: its noise levels and what leads from one to the next."""

    steps: Steps = Field(4, description="forwards of the generator a video")
    grid: Literal["stretched", "wan"] = Field(
        "stretched",
        description="stretched: from 1 down to last_sigma, as a stock FlowMatchEulerDiscreteScheduler has it; wan: from 0.999 in even "
        "steps to 0, moved by the shift, as the original Wan2.1 code's UniPC has it",
    )
    shift: Annotated[float, Field(gt=0)] = Field(5.0, description="moves the grid's levels towards 1")
    last_sigma: Rate | None = Field(
        0.625, description="noise level of the last step, to which the stretched grid is stretched; none at 1 step"
    )
    timesteps: Timesteps | None = Field(
        None, description="the levels themselves, 1000 x sigma, falling, in place of a grid; steps is their number"
    )
    solver: Literal["sde", "ode"] = Field(
        "sde", description="sde: x0 is noised afresh to the next level; ode: with the noise that the model sees in x, nothing is drawn"
    )

    @model_validator(mode="before")
    @classmethod
    def count_timesteps(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("timesteps"), list | tuple) and given["timesteps"]:
            return {"steps": len(given["timesteps"]), **given}
        return given

    @field_validator("timesteps")
    @classmethod
    def check_timesteps(cls, timesteps: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        for before, after in itertools.pairwise(timesteps or ()):
            if after >= before:
                raise PydanticCustomError("order", f"must fall, but {after:g} follows {before:g}")
        if timesteps and info.data.get("steps", len(timesteps)) != len(timesteps):
            raise PydanticCustomError("count", f"are {len(timesteps)}, but steps={info.data['steps']}; leave steps out or let it be that")
        return timesteps


class Validation(Section):
    every: NotNegative = Field(500, description="steps between two looks at the generator; 0 is never")
    prompts: Positive = Field(4, description="how many of the dataset's captions are sampled and measured")
    shown: NotNegative = Field(8, description="the first so many of them become mp4 files")
    batch_size: Positive = Field(1, description="videos a rank makes at once")
    reference: str | None = Field(
        None, description="features of a kept set, a file or one in dmd_ds/assets: the Fréchet distance to it is measured"
    )
    teacher_steps: NotNegative = Field(
        30, description="steps of the teacher's own videos of the same prompts, made once, against which drift is watched; 0 is no watch"
    )
    drift_band: Annotated[float, Field(gt=0)] = Field(0.25, description="share of the teacher's by which a measure may be off unwarned")
    keep_best: bool = Field(
        True, description="saves where the Fréchet distance, or without a reference the drift, is least so far; checkpoints/best names it"
    )


Stage = Literal["cfg_distill", "regression", "dmd2", "reward"]
# the stages that use a section; one that is not here is of all stages
USED_BY: dict[str, tuple[Stage, ...]] = {
    "cfg_distill": ("cfg_distill",),
    "fake_score": ("dmd2",),
    "gan": ("dmd2",),
    "regression": ("regression", "dmd2"),
    "reward": ("reward",),
    "rollout": ("dmd2",),
    "sampling": ("regression", "dmd2", "reward"),
}


class Recipe(Section):
    stage: Stage = Field("dmd2", description="what is trained towards what: dmd_ds/distill has a file for each")
    output_dir: str = Field(description="the run's folder; where it holds a checkpoint, the run goes on from it")
    max_steps: NotNegative = Field(description="trainer steps; of DMD2 each but a warm-up's updates the fake score")
    max_hours: Annotated[float, Field(gt=0)] | None = Field(None, description="of this command; then it saves and ends, as on SIGTERM")
    max_skipped_updates: NotNegative = Field(
        10, description="updates in a row that may be left out for a loss or gradient that is not finite, before the run ends"
    )
    save_every: Positive = Field(500, description="trainer steps between two checkpoints")
    keep_checkpoints: Positive | None = Field(None, description="the newest so many stay, and the best; null: all")
    keep_every: Positive | None = Field(None, description="with keep_checkpoints: those of every so many steps stay too")
    background_save: bool = Field(False, description="training waits for a copy in the host's memory and not for the disk")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="where numbers go beside metrics.jsonl; keys of services stay in the environment"
    )
    seed: Seed = Field(0, description="of every random draw of the run")
    activation_checkpointing: bool = Field(True, description="keeps a block's input alone for the backward and computes the rest again")
    activation_offload: bool = Field(False, description="what checkpointing keeps, each block's input, is kept in the host's memory")
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    generator: Generator
    fake_score: FakeScore | None = Field(None, description="of DMD2, and of no other stage")
    score: Score = Score()
    cfg_distill: CfgDistill = CfgDistill()
    regression: Regression = Regression()
    reward: Reward = Reward()
    gan: Gan = Gan()
    rollout: Rollout = Rollout()
    sampling: Sampling = Sampling()
    validation: Validation = Validation()

    @field_validator("activation_offload")
    @classmethod
    def _needs_checkpointing(cls, offload: bool, before: ValidationInfo) -> bool:
        if offload and not before.data.get("activation_checkpointing", True):
            raise ValueError("needs activation_checkpointing=true: only what checkpointing keeps is moved")
        return offload

    @model_validator(mode="after")
    def _check_sections(self) -> "Recipe":
        """Those that the stage needs are there, and none that it would pass over."""
        for section, stages in USED_BY.items():
            if self.stage not in stages and getattr(self, section) != type(self).model_fields[section].default:
                raise PydanticCustomError("unused", f"{section}: stage={self.stage} has no use for this section")
        if self.stage == "dmd2" and self.fake_score is None:
            raise PydanticCustomError("lacking", "the key fake_score is missing")
        if self.stage == "reward" and not self.reward.rewards:
            raise PydanticCustomError("lacking", "the key reward.rewards is missing")
        if self.stage == "reward" and self.generator.lora_rank is None:
            raise PydanticCustomError("lacking", "generator.lora_rank=None: stage=reward trains an adapter, which it weighs against none")
        if self.stage == "reward" and self.model.guidance_embedding:
            raise PydanticCustomError("unused", "model.guidance_embedding=True: stage=reward trains an adapter alone")
        if self.stage == "reward" and self.reward.steps > self.sampling.steps:
            raise PydanticCustomError("range", f"reward.steps={self.reward.steps}: are of sampling.steps={self.sampling.steps}")
        if self.stage == "regression" and self.regression.steps:
            text = f"regression.steps={self.regression.steps}: of a warm-up of DMD2; stage=regression takes max_steps"
            raise PydanticCustomError("unused", text)
        if self.regression.target == "half_step" and self.sampling.solver != "ode":
            raise PydanticCustomError("solver", "regression.target=half_step: of steps along the velocity, give sampling.solver=ode")
        return self

    def is_generator_due(self, step: int) -> bool:
        """Whether this step of DMD2 updates the generator too."""
        return (step - self.regression.steps) % self.fake_score.updates_per_generator_update == 0

    def generator_updates(self, step: int) -> int:
        """How often the generator has been updated before this step; DMD2 does it in its warm-up and then where it is due."""
        if self.stage != "dmd2":
            return step
        warm = self.regression.steps
        return min(step, warm) + -(-max(0, step - warm) // self.fake_score.updates_per_generator_update)

    @property
    def all_generator_updates(self) -> int:
        return self.generator_updates(self.max_steps)

    def global_batch_size(self, world_size: int) -> int:
        """Samples of a step on so many ranks."""
        return self.data.batch_size * self.data.accumulation * (world_size // (self.parallel.ulysses * self.parallel.ring))

    @property
    def uses_latents(self) -> bool:
        """Whether training looks at the dataset's latents, and not at its prompts alone."""
        if self.stage == "cfg_distill":
            return self.cfg_distill.input == "data"
        warms_up = self.stage == "regression" or self.regression.steps > 0
        return self.gan.is_on or self.rollout.input == "data" or (warms_up and self.regression.target == "consistency")

    @property
    def is_few_step(self) -> bool:
        """Whether the generator is trained to sample as `sampling` says; else it samples as its teacher does."""
        return self.stage != "cfg_distill"


# ---- reading ----------------------------------------------------------------------------------------------------------


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml"))


def described_recipes() -> str:
    """A line a shipped recipe: its name, and what the first line of its file says."""
    width = max(map(len, shipped_recipes()))
    firsts = {name: read_text(PACKAGE / "recipes" / f"{name}.yaml").splitlines()[0] for name in shipped_recipes()}
    return "\n".join(f"{name:{width}}  {first.removeprefix('#').strip()}" for name, first in firsts.items())


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or the YAML file itself."""
    shipped = PACKAGE / "recipes" / f"{name}.yaml"
    if os.path.isfile(shipped):  # unlike Path.is_file it takes any text for a name, the longest too
        return shipped
    if os.path.isfile(name):
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
        kind = field.annotation
        if NoneType in get_args(kind):  # a section that may not be there
            kind = get_args(kind)[0]
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        keys += known_keys(kind, f"{prefix}{name}.") if is_section else [prefix + name]
    return keys


def load_recipe(name: str, overrides: list[str] = ()) -> Recipe:
    """The recipe of a shipped name or YAML file, with `key=value` overrides; `UserError` names the file and the key."""
    path = find_recipe(name)
    tree = parse_yaml(read_text(path), str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, not a {type(tree).__name__}")
    for override in overrides:
        set_key(tree, override)
    return validated(Recipe, tree, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What YAML says, values alone: no tag of it makes an object of another kind. `where` names it in errors."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # all but the first: of values like !!int x
        raise UserError(f"{where}: not readable as YAML: {error}") from error


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
    value = parse_yaml(text, repr(override))
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-5 as text: it wants a dot and a sign
    tree[leaf] = value


def validated(section: type[AnySection], value: Any, where: str, within: str = "") -> AnySection:
    """The value as that section; `UserError`, begun with `where`, for one that is none. `within`: before its keys in errors."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error.errors()[0], section, within)}") from error


def explain(problem: dict[str, Any], section: type[BaseModel] = Recipe, within: str = "") -> str:
    """One line for one pydantic problem."""
    if not problem["loc"] and problem["type"] in ("unused", "lacking", "range", "solver"):  # of several keys
        return problem["msg"]
    key = within + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, known_keys(section, within))}"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    return f"{key}={SHORT.repr(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


# ---- what it names on disk --------------------------------------------------------------------------------------------


def find_folder(key: str, path: str, holding: str) -> Path:
    """The folder a recipe's key names: from here, or one that ships in dmd_ds/assets. It must hold the named file."""
    for folder in (Path(path), PACKAGE / "assets" / path):
        if os.path.isfile(folder / holding):
            return folder
    if os.path.isdir(path):
        raise UserError(f"{key}={path}: no {holding} in that folder")
    raise UserError(f"{key}={path}: no such folder, here or in {PACKAGE.name}/assets")


def find_file(key: str, path: str) -> Path:
    """The file a recipe's key names: from here, or one that ships in dmd_ds/assets."""
    for file in (Path(path), PACKAGE / "assets" / path):
        if os.path.isfile(file):
            return file
    raise UserError(f"{key}={path}: no such file, here or in {PACKAGE.name}/assets")


def find_ds_config(key: str, path: str) -> Path:
    for file in (Path(path), REPOSITORY / path, INSTALLED / path):
        if os.path.isfile(file):
            return file
    raise UserError(f"{key}={path}: no such file")

"""Checkpoints of a run: a folder a step, with a folder an engine, and `latest`, which names the newest whole one.

checkpoints/step_000500/{generator,fake_score}/   DeepSpeed's own files, one set a rank; frozen weights are not in them
checkpoints/step_000500/ema/                      the generator's average, where there is one: a file a rank
checkpoints/step_000500/state.json                step, ranks, video size, versions
checkpoints/step_000500/recipe.yaml               the recipe it was trained with
checkpoints/latest                                "step_000500", written when all ranks have finished
checkpoints/best                                  likewise, of the one with the best score of those that were looked at
"""

import json
import pickle
import shutil
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors import SafetensorError
from safetensors.torch import load_file

from dmd_ds import __version__
from dmd_ds.errors import UserError, read_json
from dmd_ds.parallel.ema import ShardedEMA, rank_file
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.recipe import Recipe, dump_recipe, known_keys, load_recipe

LATEST, BEST = "latest", "best"
EMA = "ema"
STATE = "state.json"
RECIPE = "recipe.yaml"
MAY_CHANGE = {"output_dir", "max_steps", "save_every", "keep_checkpoints"}


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames: a file of this name is never half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def save(
    run: Path,
    step: int,
    engines: dict[str, deepspeed.DeepSpeedEngine],
    ema: ShardedEMA | None,
    recipe: Recipe,
    video: dict[str, float],
    score: float | None,
    is_best: bool,
    mesh: Mesh,
) -> Path:
    """Writes the checkpoint after `step` steps; all ranks call it. `video`: frames, height, width, fps of the training data;
    `score`: what the look at this step gave, less is better; `is_best`: than all before."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if mesh.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / EMA if ema else unfinished).mkdir(parents=True)
    mesh.barrier()
    if ema:
        ema.save(unfinished / EMA, mesh.rank)
    for name, engine in engines.items():
        engine.save_checkpoint(str(unfinished), tag=name, save_latest=False, exclude_frozen_parameters=True)
    mesh.barrier()
    for name in engines:  # on every node: a node without the shared folder sees only its own ranks' files
        written = len(list((unfinished / name).glob("*_optim_states.pt")))
        if written != mesh.world_size:
            raise UserError(f"{unfinished / name}: {written} of {mesh.world_size} rank files; output_dir must be one folder for all nodes")
    mesh.barrier()
    if mesh.is_first:
        versions = {"dmd_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__}
        state = {"step": step, "world_size": mesh.world_size, "video": video, "score": score, **versions}
        (unfinished / RECIPE).write_text(dump_recipe(recipe))
        (unfinished / STATE).write_text(json.dumps(state, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        write_whole(folder.with_name(LATEST), folder.name)
        if is_best:
            write_whole(folder.with_name(BEST), folder.name)
        if recipe.keep_checkpoints is not None:
            remove_old(run, recipe.keep_checkpoints)
    mesh.barrier()
    return folder


def remove_old(run: Path, newest: int) -> None:
    """Keeps the newest so many and the best. (A run that was sent back to an older one has newer ones than its latest.)"""
    named = pointed(run, BEST), pointed(run, LATEST)
    whole = sorted((run / "checkpoints").glob("step_*[0-9]"), key=lambda folder: int(folder.name.removeprefix("step_")))
    for folder in whole[:-newest]:
        if folder not in named:
            shutil.rmtree(folder)


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none."""
    return pointed(run, LATEST)


def pointed(run: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, None where there is no such pointer; `UserError` when it names one that is gone."""
    pointer = run / "checkpoints" / name
    if not pointer.is_file():
        return None
    folder = pointer.with_name(pointer.read_text().strip())
    if not (folder / STATE).is_file():
        raise UserError(f"{pointer} names {folder.name}, which is not a whole checkpoint; name another one in it or remove it")
    return folder


def best_score(run: Path, recipe: Recipe) -> float | None:
    """That of the best checkpoint; None where there is none, or it was looked at in another way."""
    folder = pointed(run, BEST)
    if folder is None or load_recipe(str(folder / RECIPE)).validation != recipe.validation:
        return None
    return read_state(folder)["score"]


def find(source: Path) -> Path:
    """The checkpoint that is meant: one itself, the newest of a run, or what a pointer such as `latest` names."""
    if source.is_file():
        source = source.with_name(source.read_text().strip())
    folder = source if (source / STATE).is_file() else latest(source)
    if folder is None:
        raise UserError(f"{source}: neither a checkpoint ({STATE} is missing) nor a run with one")
    return folder


def read_state(folder: Path) -> dict:
    return read_json(folder / STATE)


def resumed_step(folder: Path, world_size: int) -> int:
    """The number of steps a checkpoint was written after; it must come from as many ranks."""
    state = read_state(folder)
    if state["world_size"] != world_size:
        raise UserError(f"{folder} was written by {state['world_size']} ranks, this job has {world_size}; resume on {state['world_size']}")
    return state["step"]


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """A resumed run goes on with the recipe it was started with; only how long it runs and what it shows may change."""
    before, now = load_recipe(str(folder / RECIPE)).model_dump(), recipe.model_dump()
    for key in known_keys():
        if key in MAY_CHANGE or key.startswith("validation."):
            continue
        old, new = before, now
        for part in key.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise UserError(f"{key}={new}: the run in {folder.parents[1]} was started with {old}; name another output_dir, or put it back")


def load(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine], ema: ShardedEMA | None, mesh: Mesh) -> None:
    for name, engine in engines.items():
        path, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder / name}"
    if ema:
        ema.load(folder / EMA, mesh.rank)


class ZeroWeights:
    """The master weights of an engine's ZeRO-3 files, of any number of ranks, whole and one at a time.

    Each rank's file holds flat buffers, memory-mapped here, with its part of every trained parameter, one after the other:
    a parameter of n elements on R ranks takes ceil(n / R) elements of each. Nothing but tensors and plain values is
    unpickled. `shapes` lists the parameters in order. `average`: a folder of a ShardedEMA of that engine, read in its place.
    """

    def __init__(self, folder: Path, average: Path | None = None):
        ranks = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=lambda path: int(path.name.split("_rank_")[1].split("_")[0]))
        models = sorted(folder.glob("zero_pp_rank_0_*_model_states.pt"))
        if not ranks or not models:
            raise UserError(f"{folder}: no ZeRO-3 checkpoint (zero_pp_rank_*_optim_states.pt and *_model_states.pt)")
        groups = self._read(models[0])["param_shapes"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self.files = ranks
        self.flat = [self._read(path)["optimizer_state_dict"]["fp32_flat_groups"] for path in ranks]
        written_by = self._read(ranks[0])["optimizer_state_dict"]["partition_count"]
        if len(ranks) != written_by:
            raise UserError(f"{folder}: {len(ranks)} rank files of {written_by}")
        if any(not len(part) for parts in self.flat for part in parts):
            raise UserError(f"{folder}: its weights were on NVMe and lie in offloaded_tensors, which this project does not read")
        if average:
            self.files = [rank_file(average, rank) for rank in range(written_by)]
            self.flat = [self._read_average(path) for path in self.files]
        self.places = self._find_places()

    @staticmethod
    def _read(path: Path) -> dict:
        try:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{path}: not readable as a checkpoint: {str(error).splitlines()[0]}") from error

    @staticmethod
    def _read_average(path: Path) -> list[torch.Tensor]:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not readable as an average of weights: {error}") from error
        return [tensors[f"flat.{group}"] for group in range(len(tensors) - 1)]

    def _find_places(self) -> dict[str, tuple[int, int, int]]:
        """For each parameter (flat group, offset, elements a rank)."""
        places, group, offset = {}, 0, 0
        for name, shape in self.shapes.items():
            part = -(-torch.Size(shape).numel() // len(self.flat))
            if offset == len(self.flat[0][group]):
                group, offset = group + 1, 0
            places[name] = group, offset, part
            offset += part
        if group != len(self.flat[0]) - 1 or offset != len(self.flat[0][group]):
            raise UserError(f"{self.files[0]}: the parameters' sizes do not add up to the file's {len(self.flat[0][-1])} elements")
        return places

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, fp32."""
        group, offset, part = self.places[name]
        shape = self.shapes[name]
        pieces = [flat[group][offset : offset + part].detach() for flat in self.flat]
        return torch.cat(pieces)[: torch.Size(shape).numel()].view(shape).float()

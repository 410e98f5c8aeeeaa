"""Checkpoints of a run: a folder a step, with a folder an engine, and `latest`, which names the newest whole one.

    checkpoints/step_000500/{generator,fake_score}/   DeepSpeed's own files, one set a rank; frozen weights are not in them
    checkpoints/step_000500/state.json                step, ranks, versions
    checkpoints/latest                                "step_000500", written when all ranks have finished
"""

import json
import shutil
from pathlib import Path

import deepspeed

from dmd_ds import __version__
from dmd_ds.errors import UserError
from dmd_ds.parallel.mesh import Mesh

LATEST = "latest"
STATE = "state.json"


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames: a file of this name is never half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def save(run: Path, step: int, engines: dict[str, deepspeed.DeepSpeedEngine], mesh: Mesh) -> Path:
    """Writes the checkpoint after `step` steps; all ranks call it."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if mesh.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    mesh.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(unfinished), tag=name, save_latest=False, exclude_frozen_parameters=True)
    mesh.barrier()
    if mesh.is_first:
        state = {"step": step, "world_size": mesh.world_size, "dmd_ds": __version__, "deepspeed": deepspeed.__version__}
        (unfinished / STATE).write_text(json.dumps(state, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        write_whole(folder.with_name(LATEST), folder.name)
    mesh.barrier()
    return folder


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none; `UserError` when `latest` names one that is gone."""
    pointer = run / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    folder = pointer.with_name(pointer.read_text().strip())
    if not (folder / STATE).is_file():
        raise UserError(f"{pointer} names {folder.name}, which is not a whole checkpoint; name another one in it or remove it")
    return folder


def read_state(folder: Path, world_size: int) -> int:
    """The number of steps a checkpoint was written after; it must come from as many ranks."""
    state = json.loads((folder / STATE).read_text())
    if state["world_size"] != world_size:
        raise UserError(f"{folder} was written by {state['world_size']} ranks, this job has {world_size}; resume on {state['world_size']}")
    return state["step"]


def load(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine]) -> None:
    for name, engine in engines.items():
        path, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder / name}"

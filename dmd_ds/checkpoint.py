"""Checkpoints of a run: a folder a step, with a folder an engine, and `latest`, which names the newest whole one.

checkpoints/step_000500/{generator,fake_score}/   what each engine trains, with its optimiser's state: dmd_ds/shards.py
checkpoints/step_000500/ema/                      the generator's average, where there is one, likewise
checkpoints/step_000500/state.json                step, ranks, global batch, video size, versions
checkpoints/step_000500/recipe.yaml               the recipe it was trained with
checkpoints/step_000500/manifest.json             size and hash of each of these files
checkpoints/latest                                "step_000500", written when all ranks have finished
checkpoints/best                                  likewise, of the one with the best score of those that were looked at

Frozen weights are not in them. A checkpoint is written as `step_000500.unfinished` and gets its name when it is whole.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch
from pydantic import Field

from dmd_ds import __version__
from dmd_ds.errors import UserError, read_json, read_text
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.parallel.state import ShardedState
from dmd_ds.recipe import Recipe, dump_recipe, known_keys, load_recipe, validated
from dmd_ds.section import NotNegative, Positive, Section
from dmd_ds.shards import PartFile, Shards

LATEST, BEST = "latest", "best"
EMA = "ema"
STATE = "state.json"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
# how long it runs, what it keeps and where it computes what; data.batch_size and .accumulation as far as the global batch stays
MAY_CHANGE = {
    "output_dir", "max_steps", "max_hours", "save_every", "keep_checkpoints", "keep_every", "background_save", "max_skipped_updates",
    "activation_checkpointing", "activation_offload", "data.batch_size", "data.accumulation", "generator.ds_config", "fake_score.ds_config",
    "trackers",
}  # fmt: skip
MAY_CHANGE_IN = ("validation.", "parallel.")


class Fingerprint(Section):
    """Of a file's content."""

    bytes: NotNegative
    sha256: str


class Manifest(Section):
    files: dict[str, Fingerprint] = Field(min_length=1)


class State(Section):
    """What state.json says."""

    step: NotNegative  # steps taken before it was written
    score: float | None
    world_size: Positive
    global_batch_size: Positive
    video: dict[str, float]
    versions: dict[str, str]


# ---- writing ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames: a file of this name is never half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def fingerprint(file: Path) -> Fingerprint:
    with file.open("rb") as content:
        return Fingerprint(bytes=file.stat().st_size, sha256=hashlib.file_digest(content, "sha256").hexdigest())


def flush(file: Path) -> None:
    """To the disk itself, so that a machine that loses its power has it."""
    with file.open("rb") as content:
        os.fsync(content.fileno())


class Writing:
    """This rank's files of one checkpoint, on their way to the disk."""

    def __init__(self, folder: Path, states: dict[str, ShardedState], mesh: Mesh, copy: bool):
        self.folder, self.rank = folder, mesh.rank
        self.files = [PartFile(state, folder / name, mesh.rank, mesh.world_size, copy) for name, state in states.items()]
        self.error: OSError | None = None
        self.is_done = False

    def run(self) -> None:
        try:
            written = [path for part in self.files for path in part.write()]
            for path in written:
                flush(path)
            prints = {str(path.relative_to(self.folder)): fingerprint(path) for path in written}
            (self.folder / rank_manifest(self.rank)).write_text(Manifest(files=prints).model_dump_json())
        except OSError as error:
            self.error = error
        self.files = []
        self.is_done = True


def rank_manifest(rank: int) -> str:
    return f"manifest_{rank:05d}.json"


class Checkpoints:
    """Writes a run's checkpoints; all ranks call everything alike.

    `states`: what is trained, by the name of its folder. `video`: frames, height, width, fps of the training data.
    With `recipe.background_save` a checkpoint is copied into the host's memory and written while training goes on; `finish` ends that.
    """

    def __init__(self, run: Path, recipe: Recipe, states: dict[str, ShardedState], video: dict[str, float], mesh: Mesh):
        self.folder, self.recipe, self.states, self.video, self.mesh = run / "checkpoints", recipe, states, video, mesh
        self.writing: Writing | None = None
        self.thread: threading.Thread | None = None
        self.state: State | None = None
        self.is_best = False
        if mesh.is_first:
            for left in self.folder.glob(f"step_*{UNFINISHED}"):
                shutil.rmtree(left)

    def load(self, folder: Path) -> None:
        """Every rank reads its parts, from files of any number of ranks, after all of them have been checked together."""
        files, problem = sorted(read_manifest(folder)), None
        try:
            check_files(folder, files[self.mesh.rank :: self.mesh.world_size])
        except UserError as error:
            problem = str(error)
        problems = [problem for problem in self.mesh.all_gather_objects(problem) if problem]
        if problems:
            raise UserError(problems[0])
        for name, state in self.states.items():
            load_state(state, folder / name, self.mesh)

    def save(self, step: int, score: float | None, is_best: bool) -> None:
        """Begins to write the checkpoint after `step` steps, and finishes it too unless that is left to the background.

        `score`: what the look at this step gave, less is better; `is_best`: than all before.
        """
        self.finish()
        self.is_best = is_best
        self.state = State(
            step=step,
            score=score,
            world_size=self.mesh.world_size,
            global_batch_size=self.recipe.global_batch_size(self.mesh.world_size),
            video=self.video,
            versions={"dmd_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
        )
        folder = self.folder / f"step_{step:06d}{UNFINISHED}"
        problem = None
        if self.mesh.is_first:
            try:
                for name in self.states:
                    (folder / name).mkdir(parents=True)
            except OSError as error:
                problem = f"cannot be made: {error.strerror}"
        self.mesh.barrier()
        if not problem and not all((folder / name).is_dir() for name in self.states):
            problem = f"is not there for rank {self.mesh.rank}; output_dir must be one folder for all nodes"
        self._raise_first(folder, problem)
        background = self.recipe.background_save
        self.writing = Writing(folder, self.states, self.mesh, copy=background)
        if background:
            self.thread = threading.Thread(target=self.writing.run, name="checkpoint")
            self.thread.start()
        else:
            self.writing.run()
            self.finish()

    @property
    def is_written_here(self) -> bool:
        """Whether this rank's part of a checkpoint waits to be finished, or failed."""
        return self.writing is not None and self.writing.is_done

    def finish(self) -> None:
        """Waits until all ranks have written, and names the checkpoint; nothing where none is being written."""
        if self.writing is None:
            return
        if self.thread:
            self.thread.join()
        writing, self.writing, self.thread = self.writing, None, None
        assert writing.is_done, "the thread that writes ended with the error above"
        self._raise_first(writing.folder, f"cannot be written: {writing.error}" if writing.error else None)
        problem = None
        if self.mesh.is_first:
            try:
                self._name(writing.folder)
            except OSError as error:
                problem = f"cannot be written: {error}"
        self._raise_first(writing.folder, problem)

    def _raise_first(self, unfinished: Path, problem: str | None) -> None:
        """`UserError` on all ranks where one of them has a problem, and nothing half written is left."""
        problems = [problem for problem in self.mesh.all_gather_objects(problem) if problem]
        if problems:
            if self.mesh.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(f"{unfinished} {problems[0]}")

    def _name(self, unfinished: Path) -> None:
        """Puts what describes it beside the ranks' files, checks that all is there, and gives it its name and `latest`."""
        world_size = self.mesh.world_size
        (unfinished / RECIPE).write_text(dump_recipe(self.recipe))
        (unfinished / STATE).write_text(self.state.model_dump_json(indent=1) + "\n")
        prints = {name: fingerprint(unfinished / name) for name in (RECIPE, STATE)}
        for rank in range(world_size):
            prints |= Manifest.model_validate_json((unfinished / rank_manifest(rank)).read_text()).files
            (unfinished / rank_manifest(rank)).unlink()
        write_whole(unfinished / MANIFEST, Manifest(files=prints).model_dump_json(indent=1) + "\n")
        check_sizes(unfinished)
        folder = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
        if folder.exists():  # a run that was sent back to an older one comes by again
            shutil.rmtree(folder)
        unfinished.rename(folder)
        write_whole(folder.with_name(LATEST), folder.name)
        if self.is_best:
            write_whole(folder.with_name(BEST), folder.name)
        remove_old(folder.parent.parent, self.recipe)


def remove_old(run: Path, recipe: Recipe) -> None:
    """Keeps the newest so many, every so many steps' and the best. (A run that was sent back has newer ones than its latest.)"""
    if recipe.keep_checkpoints is None:
        return
    named = pointed(run, BEST), pointed(run, LATEST)
    whole = sorted((run / "checkpoints").glob("step_*[0-9]"), key=step_of)
    for folder in whole[: -recipe.keep_checkpoints]:
        if folder not in named and not (recipe.keep_every and step_of(folder) % recipe.keep_every == 0):
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# ---- reading ----------------------------------------------------------------------------------------------------------


def load_state(state: ShardedState, folder: Path, mesh: Mesh) -> None:
    """`UserError` where it is of other weights than those that are trained here."""
    shards = Shards(folder)
    if shards.shapes != state.shapes:
        apart = {name for name in shards.shapes.keys() | state.shapes.keys() if shards.shapes.get(name) != state.shapes.get(name)}
        raise UserError(f"{folder}: its weights are not those of this recipe; {min(apart)} differs")
    state.load(lambda kind, part: shards.part(kind, part.name, mesh.rank, mesh.world_size), shards.kinds, shards.numbers)


def read_manifest(folder: Path) -> dict[str, Fingerprint]:
    """By file, relative to the checkpoint."""
    files = validated(Manifest, read_json(folder / MANIFEST), str(folder / MANIFEST)).files
    strange = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]
    if strange:
        raise UserError(f"{folder / MANIFEST}: {strange[0]!r} is outside of the checkpoint")
    return files


def check_sizes(folder: Path, names: Iterable[str] | None = None) -> None:
    """`UserError` names the first file, of these or of all, that is not as long as it was written."""
    manifest = read_manifest(folder)
    for name in manifest if names is None else names:
        entry = manifest[name]
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != entry.bytes:
            size = "missing" if found is None else f"{found} bytes"
            raise UserError(f"{folder / name}: {size}, written were {entry.bytes} bytes; {another()}")


def check_files(folder: Path, names: Iterable[str]) -> None:
    """`UserError` names the first of these files that is not what was written."""
    names, manifest = list(names), read_manifest(folder)
    check_sizes(folder, names)
    with ThreadPoolExecutor() as pool:
        for name, found in zip(names, pool.map(lambda name: fingerprint(folder / name), names), strict=True):
            if found != manifest[name]:
                raise UserError(f"{folder / name}: is not what was written (sha256 differs from {MANIFEST}); {another()}")


def another() -> str:
    return f"write the name of another checkpoint into {LATEST} beside it to go on from there"


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none."""
    return pointed(run, LATEST)


def pointed(run: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, None where there is no such pointer; `UserError` when it names one that is gone."""
    pointer = run / "checkpoints" / name
    if not pointer.is_file():
        return None
    return named_by(pointer)


def named_by(pointer: Path) -> Path:
    name = read_text(pointer).strip()
    if not re.fullmatch(r"step_[0-9]{1,20}", name) or not (pointer.with_name(name) / STATE).is_file():
        raise UserError(f"{pointer} names {name}, which is not a whole checkpoint; name another one in it or remove it")
    return pointer.with_name(name)


def best_score(run: Path, recipe: Recipe) -> float | None:
    """That of the best checkpoint; None where there is none, or it was looked at in another way."""
    folder = pointed(run, BEST)
    if folder is None or load_recipe(str(folder / RECIPE)).validation != recipe.validation:
        return None
    return read_state(folder).score


def find(source: Path) -> Path:
    """The checkpoint that is meant: one itself, the newest of a run, or what a pointer such as `latest` names."""
    if source.is_file():
        source = named_by(source)
    folder = source if (source / STATE).is_file() else latest(source)
    if folder is None:
        raise UserError(f"{source}: neither a checkpoint ({STATE} is missing) nor a run with one")
    return folder


def read_state(folder: Path) -> State:
    return validated(State, read_json(folder / STATE), str(folder / STATE))


def check_same_recipe(folder: Path, recipe: Recipe, world_size: int) -> None:
    """A resumed run goes on with the recipe it was started with; only how long and where it runs and what it shows may change."""
    before, now = load_recipe(str(folder / RECIPE)).model_dump(), recipe.model_dump()
    for key in known_keys():
        if key in MAY_CHANGE or key.startswith(MAY_CHANGE_IN):
            continue
        old, new = before, now
        for part in key.split("."):  # through sections, of which one may not be there
            old, new = old and old[part], new and new[part]
        if old != new:
            raise UserError(f"{key}={new}: the run in {folder.parents[1]} was started with {old}; name another output_dir, or put it back")
    batch, was = recipe.global_batch_size(world_size), read_state(folder).global_batch_size
    if batch != was:
        raise UserError(
            f"data.batch_size={recipe.data.batch_size} on {world_size} ranks is a global batch of {batch}, the run in {folder.parents[1]} "
            f"has {was}; change data.batch_size or data.accumulation so that it stays"
        )

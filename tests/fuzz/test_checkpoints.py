"""Whatever the files of a checkpoint hold, they are read or refused in one line: a thousand damaged ones for each."""

from pathlib import Path

import pytest

from dmd_ds import checkpoint
from dmd_ds.export import find_student
from dmd_ds.shards import PARAMETERS, PartFile, Shards, rank_file
from tests.fuzz.test_readers import fuzz
from tests.mini import make_recipe
from tests.test_checkpoint import PlainState, values


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's one checkpoint, of two ranks."""
    folder = tmp_path / "run" / "checkpoints" / "step_000003"
    (folder / "generator").mkdir(parents=True)
    for rank in (0, 1):
        PartFile(PlainState(values(), rank, 2), folder / "generator", rank, 2, copy=False).write()
    recipe = make_recipe(tmp_path, output_dir=str(tmp_path / "run"))
    (folder / "recipe.yaml").write_text(recipe.model_dump_json())  # JSON is YAML
    state = checkpoint.State(step=3, score=0.5, world_size=2, global_batch_size=2, video={"fps": 8.0}, versions={"torch": "2"})
    (folder / "state.json").write_text(state.model_dump_json())
    names = [f"generator/{name}" for name in (PARAMETERS, rank_file(0), rank_file(1))]
    manifest = checkpoint.Manifest(files={name: checkpoint.fingerprint(folder / name) for name in names})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder.parent / "latest").write_text(folder.name)
    return folder


def read_shards(folder: Path) -> None:
    shards = Shards(folder)
    for name in shards.shapes:
        shards.read(name)


@pytest.mark.parametrize("file", [PARAMETERS, rank_file(1)])
def test_shards(folder, file):
    fuzz([folder / "generator" / file], lambda: read_shards(folder / "generator"))


def test_states(folder):
    fuzz([folder / "state.json"], lambda: checkpoint.read_state(folder))


def test_manifests(folder):
    fuzz([folder / "manifest.json"], lambda: checkpoint.check_files(folder, checkpoint.read_manifest(folder)))


def test_pointers(folder):
    fuzz([folder.parent / "latest"], lambda: checkpoint.find(folder.parents[1]))


def test_a_student_of_any_of_them(folder):
    def read():
        try:
            find_student(folder)
        except checkpoint.UserError as error:
            if "its tensors are not those of" not in str(error):  # they never were
                raise

    fuzz([folder / "recipe.yaml", folder / "state.json", folder / "manifest.json"], read, inputs=300)

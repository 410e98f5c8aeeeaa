"""Noise levels, noising, and draws that depend on their key and on nothing else."""

import pytest
import torch

from dmd_ds import flow
from dmd_ds.randomness import Randomness


def test_x0_comes_back_from_the_true_velocity():
    x0, noise, sigma = torch.randn(3, 2, 2, 4, 4), torch.randn(3, 2, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    x = flow.add_noise(x0, noise, sigma)
    torch.testing.assert_close(flow.x0_from_velocity(x, noise - x0, sigma), x0)
    torch.testing.assert_close(x[2], noise[2])


def test_shift_keeps_the_ends_and_moves_the_middle_up():
    shifted = flow.shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 5.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 5 / 6, 1.0]))
    torch.testing.assert_close(flow.shift_sigma(shifted, 1 / 5.0), torch.tensor([0.0, 0.5, 1.0]))


def test_a_draw_is_a_function_of_its_key():
    one, two = Randomness(3), Randomness(3)
    two.normal("other", 9, [4], (2,))  # draws leave no trace
    torch.testing.assert_close(one.normal("noise", 5, [0, 1], (2, 3)), two.normal("noise", 5, [0, 1], (2, 3)), rtol=0, atol=0)


def test_samples_draw_alike_however_they_are_spread_over_ranks():
    draws = Randomness(0)
    together = draws.normal("noise", 1, [0, 1, 2, 3], (4,))
    torch.testing.assert_close(torch.cat([draws.normal("noise", 1, [0, 1], (4,)), draws.normal("noise", 1, [2, 3], (4,))]), together)


@pytest.mark.parametrize("seed, purpose, step, sample", [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)])
def test_every_part_of_the_key_counts(seed, purpose, step, sample):
    ours = Randomness(0).normal("a", 0, [0], (8,))
    assert not torch.allclose(ours, Randomness(seed).normal(purpose, step, [sample], (8,)))


def test_integers_reach_every_value_and_permutations_every_place():
    draws = Randomness(0)
    assert {draws.integer("exit", step, 4) for step in range(100)} == {0, 1, 2, 3}
    assert sorted(draws.permutation("order", 0, 10)) == list(range(10))
    assert draws.permutation("order", 0, 10) != draws.permutation("order", 1, 10)

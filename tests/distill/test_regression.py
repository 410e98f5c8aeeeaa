"""The teacher's paths, against flows whose paths are known."""

import torch

from dmd_ds.distill.levels import even_levels, halved_levels, path_levels
from dmd_ds.distill.losses import regression_loss
from dmd_ds.distill.regression import teacher_path, two_halves
from dmd_ds.recipe import Sampling
from dmd_ds.sampler import few_step_schedule

SCHEDULE = few_step_schedule(Sampling(steps=4))
SHAPE = (2, 3, 2, 4, 4)


def test_a_path_meets_the_generators_levels_and_ends_at_zero():
    levels = path_levels(SCHEDULE, steps=10, shift=3.0)
    assert set(SCHEDULE.sigmas.tolist()) <= set(levels.tolist())
    assert float(levels[0]) == float(SCHEDULE.sigmas[0]) and float(levels[-1]) == 0
    assert (levels[:-1] > levels[1:]).all() and 10 <= len(levels) <= 10 + 5


def test_towards_one_video_the_path_is_straight():
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    sigma = float(SCHEDULE.sigmas[2])
    levels = path_levels(SCHEDULE, 5, 3.0)
    at, end = teacher_path(lambda x, sigma_B: (x - x0) / sigma_B.view(-1, 1, 1, 1, 1), noise, levels, sigma)
    torch.testing.assert_close(end, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at, (1 - sigma) * x0 + sigma * noise, atol=1e-5, rtol=1e-5)


def test_the_path_is_of_second_order():
    """Of Gaussian data of deviation 0.5, whose paths are noise x sqrt((1 - sigma)^2 / 4 + sigma^2)."""

    def velocity(x, sigma_B):
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        return x * (sigma - 0.25 * (1 - sigma)) / (0.25 * (1 - sigma) ** 2 + sigma**2)

    noise = torch.randn(SHAPE)
    errors = []
    for steps in (16, 32):
        _, end = teacher_path(velocity, noise, path_levels(SCHEDULE, steps, 1.0), 1.0)
        errors.append(float((end - 0.5 * noise).abs().max()))
    assert errors[0] < 0.05 and errors[0] / errors[1] > 2.8  # 4 for equal steps of second order, 2 of first


def test_the_loss_is_the_mean_square():
    assert float(regression_loss(torch.full(SHAPE, 3.0), torch.full(SHAPE, 1.0))) == 4.0


def test_even_levels_fall_from_1_to_0_and_half_steps_lie_between_the_generators_own():
    assert torch.allclose(even_levels(2, 3.0), torch.tensor([1.0, 0.75, 0.0]))
    halved = halved_levels(SCHEDULE)
    assert torch.equal(halved[::2], SCHEDULE.sigmas) and torch.allclose(halved[1::2], (halved[:-2:2] + halved[2::2]) / 2)


def test_a_step_of_the_generator_ends_where_the_teachers_two_halves_do():
    noise = torch.randn(SHAPE)
    levels = halved_levels(SCHEDULE)
    middle, last = (float(levels[number]) for number in (3, 4))
    first = float(levels[2])

    def velocity(x, sigma_B):
        return x * sigma_B.view(-1, 1, 1, 1, 1)

    at, x0 = two_halves(velocity, noise, levels, first)
    x = noise
    for level, following in ((1.0, levels[1]), (levels[1], first)):
        x = x * (1 + (float(following) - float(level)) * float(level))
    torch.testing.assert_close(at, x)
    end = at * (1 + (middle - first) * first) * (1 + (last - middle) * middle)
    v = (at - x0) / first
    torch.testing.assert_close(at + (last - first) * v, end, atol=1e-5, rtol=1e-5)

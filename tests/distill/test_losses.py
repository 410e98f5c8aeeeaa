"""The losses against what the papers say, with numbers worked out by hand."""

import pytest
import torch

from dmd_ds.distill.losses import (
    approximate_r1,
    discriminator_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    flow_matching_loss,
    generator_gan_loss,
    guided_prediction,
    pseudo_huber_loss,
    score_difference,
    velocity_difference,
)

SHAPE = (2, 3, 2, 4, 4)


def full(value: float) -> torch.Tensor:
    return torch.full(SHAPE, value)


def test_the_gradient_points_from_the_fake_score_to_the_real_one_in_units_of_the_error():
    gradient = distribution_matching_gradient(full(1.0), real_BCTHW=full(3.0), fake_BCTHW=full(2.0))
    torch.testing.assert_close(gradient, full((2.0 - 3.0) / 2.0))  # a descent step moves x0 up, towards the real score


def test_the_normaliser_is_one_number_a_sample_over_all_of_its_elements():
    x0, real = full(0.0), full(1.0)
    real[1] = 4.0
    real[0, :, :, :, 0] = 5.0  # one column of pixels must not get a scale of its own
    gradient = distribution_matching_gradient(x0, real, torch.zeros(SHAPE))
    torch.testing.assert_close(gradient, -real / torch.tensor([2.0, 4.0]).view(-1, 1, 1, 1, 1))


def test_a_perfect_sample_gives_a_finite_gradient():
    assert distribution_matching_gradient(full(1.0), full(1.0), full(1.0)).abs().max() == 0
    assert torch.isfinite(distribution_matching_gradient(full(1.0), full(1.0), full(2.0))).all()


def test_dloss_dx0_is_the_derivative_of_the_loss_with_its_stopped_target():
    x0 = torch.randn(SHAPE, requires_grad=True)
    gradient = torch.randn(SHAPE)
    loss = 0.5 * ((x0 - (x0 - gradient).detach()) ** 2).mean()
    loss.backward()
    value, dloss_dx0 = distribution_matching_loss(gradient)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(dloss_dx0, x0.grad)


def test_the_fake_scores_loss_is_zero_for_the_true_velocity():
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    assert flow_matching_loss(noise - x0, x0, noise) == 0
    assert flow_matching_loss(noise - x0 + 2, x0, noise) == pytest.approx(4, rel=1e-5)


def test_guidance_of_one_is_the_conditional_model():
    torch.testing.assert_close(guided_prediction(full(3.0), full(1.0), torch.tensor([1.0])), full(3.0))
    torch.testing.assert_close(guided_prediction(full(3.0), full(1.0), torch.tensor([2.5])), full(6.0))


def test_without_the_normaliser_the_gradient_is_the_difference_of_the_scores():
    torch.testing.assert_close(score_difference(real_BCTHW=full(3.0), fake_BCTHW=full(1.0)), full(-2.0))


def test_generator_and_discriminator_want_opposite_marks_for_what_is_made():
    low, high = torch.tensor([[-2.0]]), torch.tensor([[2.0]])
    assert generator_gan_loss(high) < generator_gan_loss(low)
    assert discriminator_loss(real_marks_BM=high, fake_marks_BM=low) < discriminator_loss(real_marks_BM=low, fake_marks_BM=high)
    # an undecided one loses log 2 for each
    assert float(discriminator_loss(torch.zeros(2, 3), torch.zeros(2, 3))) == pytest.approx(2 * 0.6931472)
    assert float(generator_gan_loss(torch.zeros(2, 3))) == pytest.approx(0.6931472)


def test_approximate_r1_is_the_squared_slope():
    # D(x) = 3 x has slope 3 whatever the strength of the disturbance
    x, noise = torch.randn(4, 1000), torch.randn(4, 1000)
    for strength in (0.1, 1.0):
        assert float(approximate_r1(3 * x, 3 * (x + strength * noise), strength)) == pytest.approx(9, rel=0.1)


def test_pseudo_huber_is_a_distance_beyond_c_and_half_a_square_over_c_below():
    assert float(pseudo_huber_loss(full(3.0), full(1.0), 0.001)) == pytest.approx(2.0 - 0.001, rel=1e-6)
    assert float(pseudo_huber_loss(full(1.01), full(1.0), 1.0)) == pytest.approx(0.01**2 / 2, rel=1e-2)


def test_the_difference_to_the_start_is_a_mean_square():
    assert float(velocity_difference(full(3.0), full(1.0))) == 4.0

"""Our sampler is the stock scheduler's, step for step, on the same noise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmd_ds.recipe import Sampling
from dmd_ds.sampler import few_step_scheduler, few_step_sigmas, few_step_x0, guided


def test_the_grid_of_four_steps_ends_where_the_recipe_says():
    sigmas = few_step_sigmas(Sampling(steps=4, shift=5.0, last_sigma=0.625))
    torch.testing.assert_close(1000 * sigmas, torch.tensor([1000.0, 965.0, 891.0, 625.0, 0.0]), atol=0.5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_our_samples_are_the_stock_schedulers_on_the_same_noise(steps, tmp_path):
    sampling = Sampling(steps=steps)
    few_step_scheduler(sampling).save_pretrained(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)  # as a user of the folder gets it
    stock.set_timesteps(steps)
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x, sigma_B):
        return torch.tanh(torch.einsum("bcthw,cd->bdthw", x, mixing)) * (1 + sigma_B.view(-1, 1, 1, 1, 1))

    shape = (2, 4, 3, 4, 4)
    draws = torch.Generator().manual_seed(1)
    noises = [torch.randn(shape, generator=draws)]
    x = noises[0]
    for timestep in stock.timesteps:
        before = draws.get_state()
        x = stock.step(velocity(x, (timestep / 1000).expand(2)), timestep, x, generator=draws, return_dict=False)[0]
        after = draws.get_state()
        draws.set_state(before)
        noises.append(torch.randn(shape, generator=draws))
        draws.set_state(after)
    ours = few_step_x0(velocity, lambda k: noises[k], few_step_sigmas(sampling), steps - 1)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_an_early_exit_is_the_models_x0_at_that_step():
    seen = []

    def velocity(x, sigma_B):
        seen.append(round(float(sigma_B[0]), 3))
        return torch.zeros_like(x)

    few_step_x0(velocity, lambda k: torch.ones(1, 1, 1, 2, 2), few_step_sigmas(Sampling()), last_step=2)
    assert seen == [1.0, 0.965, 0.891]


def test_guidance_is_ho_and_salimans_and_costs_one_pass_at_one():
    calls = []

    def conditional(x, sigma_B):
        return torch.full_like(x, 3.0)

    def unconditional(x, sigma_B):
        calls.append(1)
        return torch.full_like(x, 1.0)

    x, sigma = torch.zeros(1, 1, 1, 1, 1), torch.ones(1)
    assert float(guided(conditional, unconditional, 2.5)(x, sigma)) == 6.0
    assert float(guided(conditional, unconditional, 1.0)(x, sigma)) == 3.0
    assert len(calls) == 1

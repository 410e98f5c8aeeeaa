"""Our sampler is the stock scheduler's, step for step, on the same noise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmd_ds.errors import UserError
from dmd_ds.recipe import Sampling
from dmd_ds.sampler import few_step_schedule, few_step_scheduler, few_step_x0, guided, nearest_stock, timesteps_apart, with_steps


def told(sampling: Sampling) -> list[float]:
    """The timesteps that the model is told."""
    return [round(1000 * float(level), 1) for level in few_step_schedule(sampling).told]


def test_the_grid_of_four_steps_ends_where_the_recipe_says():
    sigmas = few_step_schedule(Sampling(steps=4, shift=5.0, last_sigma=0.625)).sigmas
    torch.testing.assert_close(1000 * sigmas, torch.tensor([1000.0, 965.0, 891.0, 625.0, 0.0]), atol=0.5, rtol=0)


def test_wans_grid_is_that_of_the_original_code():
    schedule = few_step_schedule(Sampling(grid="wan", steps=5, shift=7.0))
    torch.testing.assert_close(schedule.sigmas, torch.tensor([0.99986, 0.96535, 0.91284, 0.82329, 0.63607, 0.0]), atol=6e-6, rtol=0)
    assert told(Sampling(grid="wan", steps=5, shift=7.0)) == [999, 965, 912, 823, 636]


def test_a_list_of_timesteps_is_the_grid():
    sampling = Sampling(timesteps=(1000, 965, 891, 625))
    torch.testing.assert_close(few_step_schedule(sampling).sigmas, torch.tensor([1.0, 0.965, 0.891, 0.625, 0.0]))
    assert sampling.steps == 4 and told(sampling) == [1000, 965, 891, 625]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(grid="wan"), Sampling(timesteps=(1000, 965, 891, 625))], ids=["stretched", "wan", "list"]
)
def test_every_kind_of_grid_has_any_number_of_steps(sampling, steps):
    schedule = few_step_schedule(with_steps(sampling, steps))
    assert schedule.steps == steps and schedule.sigmas[0] > 0.999 and schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all() and with_steps(sampling, 4) == sampling


def test_half_the_steps_of_a_list_are_every_second_and_more_lie_between():
    sampling = Sampling(timesteps=(1000, 965, 891, 625), solver="ode")
    assert told(with_steps(sampling, 2)) == [1000, 891] and with_steps(sampling, 2).solver == "ode"
    assert told(with_steps(sampling, 8)) == [1000, 982.5, 965, 928, 891, 758, 625, 312.5]


def test_a_student_of_one_step_that_names_no_last_level_has_no_grid_of_more():
    with pytest.raises(UserError, match="steps=4: the student was trained at 1 step and without last_sigma"):
        with_steps(Sampling(steps=1, last_sigma=None), 4)
    assert told(with_steps(Sampling(steps=1, last_sigma=0.5), 2)) == [1000, 500]


def test_the_nearest_stock_sampling_is_itself_or_a_stretched_grid_that_is_close():
    for sampling in (Sampling(), Sampling(solver="ode"), Sampling(grid="wan", solver="ode"), Sampling(grid="wan", steps=1)):
        assert nearest_stock(sampling) is sampling
    listed = Sampling(timesteps=(1000, 750, 500))
    assert nearest_stock(listed).shift == 1 and timesteps_apart(listed, nearest_stock(listed)) < 1e-3
    wan = Sampling(grid="wan", steps=5, shift=7.0)
    near = nearest_stock(wan)
    assert (near.grid, near.solver, near.timesteps) == ("stretched", "sde", None)
    assert timesteps_apart(wan, near) < 1.01 < 40 < timesteps_apart(wan, near.model_copy(update={"shift": 7.0}))


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
    ours = few_step_x0(velocity, lambda k: noises[k], few_step_schedule(sampling), steps - 1)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_an_early_exit_is_the_models_x0_at_that_step():
    seen = []

    def velocity(x, sigma_B):
        seen.append(round(float(sigma_B[0]), 3))
        return torch.zeros_like(x)

    few_step_x0(velocity, lambda k: torch.ones(1, 1, 1, 2, 2), few_step_schedule(Sampling()), last_step=2)
    assert seen == [1.0, 0.965, 0.891]


def test_the_ode_keeps_the_noise_that_the_model_sees():
    """Where the model knows x0 and noise, it comes to x0 along the straight line between them, with no other noise drawn."""
    x0, noise, seen = torch.full((1, 1, 1, 2, 2), 3.0), torch.ones(1, 1, 1, 2, 2), []

    def velocity(x, sigma_B):
        seen.append(x)
        return noise - x0

    schedule = few_step_schedule(Sampling(timesteps=(1000, 750, 250), solver="ode"))
    torch.testing.assert_close(few_step_x0(velocity, {0: noise}.__getitem__, schedule, 2), x0)
    torch.testing.assert_close(torch.stack(seen), torch.stack([noise, 0.25 * x0 + 0.75 * noise, 0.75 * x0 + 0.25 * noise]))


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

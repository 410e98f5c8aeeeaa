"""What is trained on: where the rollout stops and has a gradient, and at which noise levels the scores look at it."""

import pytest
import torch

from dmd_ds.distill.levels import score_sigmas
from dmd_ds.distill.rollout import rollout
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Sampling, Score
from dmd_ds.sampler import few_step_schedule, few_step_x0

SHAPE = (4, 2, 4, 4)
UNIFORM = torch.linspace(0, 1, 101)


@pytest.mark.parametrize("solver", ["sde", "ode"])
@pytest.mark.parametrize("exit_step", [0, 1, 39])
def test_the_rollout_is_the_sampler_with_a_gradient_at_its_exit_alone(solver, exit_step):
    """Also where the model is told of several noise levels as the same whole timestep."""
    schedule = few_step_schedule(Sampling(grid="wan", steps=40, shift=30.0, solver=solver))
    assert schedule.told[0] == schedule.told[1]
    before, at_exit = torch.tensor(1.0, requires_grad=True), []

    def noise(k: int) -> torch.Tensor:
        return Randomness(0).normal(f"generator/rollout{k}", 3, [5], SHAPE)

    def velocity_at_exit(x: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        at_exit.append(torch.tensor(1.0, requires_grad=True))
        return at_exit[-1] * torch.tanh(x)

    x0 = rollout(lambda x, sigma_B: before * torch.tanh(x), velocity_at_exit, noise, schedule, exit_step)
    sampled = few_step_x0(lambda x, sigma_B: torch.tanh(x), noise, schedule, exit_step)
    torch.testing.assert_close(x0, sampled, rtol=0, atol=0)
    x0.sum().backward()
    assert before.grad is None and len(at_exit) == 1 and at_exit[0].grad != 0


def test_score_levels_are_even_at_shift_1_and_clamped():
    score = Score(shift=1.0, sigma_min=0.05, sigma_max=0.9)
    torch.testing.assert_close(score_sigmas(UNIFORM, score), UNIFORM.clamp(0.05, 0.9))


def test_score_levels_above_the_exit_are_the_shifted_ones_of_that_range():
    score = Score(shift=5.0, sigma_min=0.0, sigma_max=1.0)
    above = score_sigmas(UNIFORM, score, lowest=0.625)
    assert above[0] == pytest.approx(0.625) and above[-1] == pytest.approx(1.0)
    # 0.625 is what the shift makes of 0.25: half of them lie above what it makes of 0.625, halfway up from there
    assert above[50] == pytest.approx(5 * 0.625 / (1 + 4 * 0.625))
    torch.testing.assert_close(score_sigmas(UNIFORM, score, lowest=0.0), score_sigmas(UNIFORM, score), rtol=0, atol=0)

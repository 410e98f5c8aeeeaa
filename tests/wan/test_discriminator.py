"""The GAN head and the score model it is part of."""

import pytest
import torch

from dmd_ds.wan.denoiser import WHOLE_SEQUENCE, WanDenoiser
from dmd_ds.wan.discriminator import HEADS, ScoreModel, default_taps
from tests.mini import TEXT_WIDTH, make_transformer

WIDTH, TOKENS, TAPS = 24, 9, 2


def features(samples: int = 3) -> list[torch.Tensor]:
    return [torch.randn(samples, TOKENS, WIDTH) for _ in range(TAPS)]


def test_taps_lie_at_a_half_three_quarters_and_the_end():
    assert default_taps(40) == (19, 29, 39)
    assert default_taps(30) == (14, 22, 29)
    assert default_taps(2) == (0, 1)
    assert default_taps(1) == (0,)


@pytest.mark.parametrize(("name", "marks"), [("token", TOKENS * TAPS), ("convolution", TAPS)])
def test_a_head_marks_each_sample_by_itself_in_float32(name, marks):
    torch.manual_seed(0)
    head, seen = HEADS[name](TAPS, WIDTH, hidden=16), features()
    given = head(seen, WHOLE_SEQUENCE, TOKENS)
    assert given.shape == (3, marks) and given.dtype == torch.float32
    alone = head([feature[1:2] for feature in seen], WHOLE_SEQUENCE, TOKENS)
    torch.testing.assert_close(alone, given[1:2])
    assert (given[0] - given[1]).abs().max() > 1e-3


def test_the_token_head_sees_a_token_at_a_time_and_the_convolution_all():
    torch.manual_seed(0)
    seen = features(1)
    changed = [feature.clone() for feature in seen]
    changed[0][0, 4, 0] += 1
    token, convolution = (HEADS[name](TAPS, WIDTH, hidden=16) for name in ("token", "convolution"))
    moved = (token(seen, WHOLE_SEQUENCE, TOKENS) != token(changed, WHOLE_SEQUENCE, TOKENS))[0].nonzero().flatten().tolist()
    assert moved == [4 * TAPS]  # marks lie token by token, tap by tap
    assert convolution(seen, WHOLE_SEQUENCE, TOKENS)[0, 0] != convolution(changed, WHOLE_SEQUENCE, TOKENS)[0, 0]


@pytest.fixture
def score_model():
    model = ScoreModel(make_transformer(), taps=(0, 1), head=HEADS["token"](2, WIDTH, hidden=16))
    model.add_adapter(rank=2, alpha=2)
    return model


def arguments(samples: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    text = torch.nn.functional.pad(torch.randn(samples, 7, TEXT_WIDTH, generator=generator), (0, 0, 0, 1))
    return torch.randn(samples, 4, 2, 4, 4, generator=generator), torch.rand(samples, generator=generator), text


def test_the_last_samples_are_judged_and_all_are_denoised_as_ever(score_model):
    x, sigma, text = arguments(3)
    velocity, marks = score_model(x, sigma, text, judged=2)
    torch.testing.assert_close(velocity, WanDenoiser.forward(score_model, x, sigma, text))
    assert marks.shape == (2, 8 * 2)
    torch.testing.assert_close(score_model(x[1:], sigma[1:], text[1:], judged=2).marks_JM, marks)
    assert score_model(x, sigma, text).marks_JM is None


def test_the_adapter_is_part_of_what_is_judged_and_the_base_is_frozen(score_model):
    x, sigma, text = arguments(2)
    score_model(x, sigma, text, judged=2).marks_JM.sum().backward()
    touched = {name for name, parameter in score_model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("head.") for name in touched) and any("lora_B" in name for name in touched)
    assert all(name.startswith("head.") or "lora_" in name for name in touched)

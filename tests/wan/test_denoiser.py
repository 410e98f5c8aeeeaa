"""WanDenoiser is diffusers' model, with trimmed text, an adapter weighed a sample, and checkpointing that changes nothing."""

import pytest
import torch

from dmd_ds.wan.denoiser import ADAPTER, TEXT_TOKENS, WanDenoiser
from tests.mini import LATENTS_SHAPE, TEXT_WIDTH, make_transformer

WORDS = 5


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, *LATENTS_SHAPE, generator=generator)
    text = torch.zeros(3, TEXT_TOKENS, TEXT_WIDTH)
    text[:, :WORDS] = torch.randn(3, WORDS, TEXT_WIDTH, generator=generator)
    return x, torch.tensor([0.1, 0.5, 0.9]), text


@pytest.fixture
def adapted():
    """A denoiser whose adapter does something: a fresh one is zero."""
    denoiser = WanDenoiser(make_transformer())
    denoiser.add_adapter(rank=4, alpha=8)
    for name, parameter in denoiser.named_parameters():
        if f"lora_B.{ADAPTER}" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


def test_the_velocity_is_that_of_diffusers_own_forward(inputs):
    x, sigma, text = inputs
    expected = make_transformer()(x, 1000 * sigma, text, return_dict=False)[0]
    torch.testing.assert_close(WanDenoiser(make_transformer())(x, sigma, text), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [WORDS + 1, 16, 64])
def test_trimmed_text_gives_what_all_512_tokens_give(inputs, tokens):
    x, sigma, text = inputs
    denoiser = WanDenoiser(make_transformer())
    torch.testing.assert_close(denoiser(x, sigma, text[:, :tokens]), denoiser(x, sigma, text), atol=1e-5, rtol=1e-5)


def test_text_trimmed_into_its_words_would_give_something_else(inputs):
    x, sigma, text = inputs
    denoiser = WanDenoiser(make_transformer())
    assert (denoiser(x, sigma, text[:, :WORDS]) - denoiser(x, sigma, text)).abs().max() > 1e-3


def test_one_batch_holds_the_real_and_the_fake_score(inputs, adapted):
    x, sigma, text = inputs
    base = WanDenoiser(make_transformer())(x, sigma, text)
    fake = adapted(x, sigma, text)
    mixed = adapted(x, sigma, text, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(mixed[[0, 2]], fake[[0, 2]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-6, rtol=1e-5)
    assert (fake - base).abs().max() > 1e-2


def test_only_the_adapter_is_trainable_and_it_covers_every_linear_layer_of_a_block(adapted):
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(f".{ADAPTER}." in name for name in trainable)
    assert len(trainable) == 2 * 10 * len(adapted.transformer.blocks)  # A and B of q k v o twice and of the ffn's two


def test_recomputation_sees_the_adapter_weight_of_its_own_call(inputs, adapted):
    x, sigma, text = inputs
    weight = torch.tensor([1.0, 0.0, 1.0])
    adapter = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    def gradients(checkpointing):
        adapted.activation_checkpointing = checkpointing
        loss = adapted(x, sigma, text, weight).square().mean()
        with torch.no_grad():  # another score is asked for between forward and backward
            adapted(x, sigma, text, torch.zeros(3))
        return torch.autograd.grad(loss, adapter)

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, kept, atol=0, rtol=0)

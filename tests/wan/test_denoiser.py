"""WanDenoiser is diffusers' model, with trimmed text, an adapter weighed a sample, and checkpointing that changes nothing."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from dmd_ds.wan.denoiser import ADAPTER, TEXT_TOKENS, ImageCondition, WanDenoiser
from tests.mini import IMAGE_EMBEDS_SHAPE, IMAGE_TRANSFORMER, LATENTS_SHAPE, TEXT_WIDTH, make_transformer

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
    denoiser.weigh_adapter()
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


def test_offload_moves_each_blocks_input_and_changes_no_gradient(inputs, monkeypatch):
    x, sigma, text = inputs
    moved = []

    def recording(pin_memory):
        def pack(tensor):
            moved.append(tuple(tensor.shape))
            return to_host.pack_hook(tensor)

        to_host = save_on_cpu(pin_memory)
        return saved_tensors_hooks(pack, to_host.unpack_hook)

    monkeypatch.setattr("dmd_ds.wan.denoiser.save_on_cpu", recording)
    gradients = []
    for offload in (False, True):
        denoiser = WanDenoiser(make_transformer(), activation_checkpointing=True, activation_offload=offload)
        denoiser(x, sigma, text).square().mean().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    tokens, width = 2 * 2 * 2, 24
    assert moved.count((3, tokens, width)) == len(denoiser.transformer.blocks)
    for there, here in zip(*gradients, strict=True):
        torch.testing.assert_close(there, here, atol=0, rtol=0)


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(3)
    channels = torch.randn(3, 4 + LATENTS_SHAPE[0], *LATENTS_SHAPE[1:], generator=generator)
    return ImageCondition(channels, torch.randn(3, *IMAGE_EMBEDS_SHAPE, generator=generator))


def image_denoiser() -> WanDenoiser:
    return WanDenoiser(make_transformer(config=IMAGE_TRANSFORMER))


@pytest.mark.parametrize("tokens", [WORDS + 1, 64, TEXT_TOKENS])
def test_image_to_video_is_diffusers_own_forward_however_the_text_is_trimmed(inputs, image, tokens):
    x, sigma, text = inputs
    transformer = make_transformer(config=IMAGE_TRANSFORMER)
    expected = transformer(torch.cat([x, image.channels_BCTHW], 1), 1000 * sigma, text, image.embeds_BLD, return_dict=False)[0]
    ours = image_denoiser()(x, sigma, text[:, :tokens], image=image)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_channels_and_embeds_of_the_image_both_matter(inputs, image):
    x, sigma, text = inputs
    denoiser = image_denoiser()
    there = denoiser(x, sigma, text, image=image)
    for other in (
        ImageCondition(image.channels_BCTHW.roll(1, 0), image.embeds_BLD),
        ImageCondition(image.channels_BCTHW, image.embeds_BLD.roll(1, 0)),
    ):
        assert (denoiser(x, sigma, text, image=other) - there).abs().amax((1, 2, 3, 4)).min() > 1e-2


def test_a_repeated_condition_stays_with_its_samples(inputs, image):
    x, sigma, text = inputs
    denoiser = image_denoiser()
    twice = denoiser(x.repeat(2, 1, 1, 1, 1), sigma.repeat(2), text.repeat(2, 1, 1), image=image.repeat(2))
    once = denoiser(x, sigma, text, image=image)
    torch.testing.assert_close(twice, once.repeat(2, 1, 1, 1, 1), atol=1e-6, rtol=1e-5)


def test_the_adapter_covers_the_image_attention_and_scores_stay_apart(inputs, image):
    x, sigma, text = inputs
    denoiser = image_denoiser()
    denoiser.add_adapter(rank=4, alpha=8)
    denoiser.weigh_adapter()
    trainable = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 12 * len(denoiser.transformer.blocks)
    for name, parameter in denoiser.named_parameters():
        if "add_v_proj.lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    mixed = denoiser(x, sigma, text, torch.tensor([1.0, 0.0, 1.0]), image=image)
    base = image_denoiser()(x, sigma, text, image=image)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-6, rtol=1e-5)
    assert (mixed - base)[[0, 2]].abs().amax((1, 2, 3, 4)).min() > 1e-3

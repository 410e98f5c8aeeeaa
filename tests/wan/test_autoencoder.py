"""Decoding with a gradient: the same frames, the same gradient, and no more of the video than is asked for."""

import pytest
import torch

from dmd_ds.wan.autoencoder import decode, decode_frames
from tests.mini import make_parts


@pytest.fixture(scope="module")
def vae():
    vae = make_parts()["vae"].requires_grad_(False)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.0, 1.5])
    return vae


def test_all_frames_are_those_that_are_decoded_without_a_gradient(vae):
    latents = torch.randn(2, 4, 3, 4, 4)
    frames = decode_frames(vae, latents, None)
    assert frames.shape == (2, 9, 3, 32, 32)
    levels = (255 * frames).permute(0, 1, 3, 4, 2)
    assert (levels - decode(vae, latents)).abs().max() <= 0.501


def test_the_gradient_is_that_of_the_whole_vae(vae):
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    weight = torch.randn(1, 9, 3, 32, 32)
    (found,) = torch.autograd.grad((weight * decode_frames(vae, latents, None)).sum(), latents)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    pixels = vae.decode(latents * std + mean).sample.transpose(1, 2)
    (expected,) = torch.autograd.grad((weight * (pixels + 1) / 2).sum(), latents)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected)


def test_chosen_frames_are_those_of_the_whole_and_nothing_behind_them_is_looked_at(vae):
    latents = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    whole = decode_frames(vae, latents, None)
    for chosen, last_latent in (([0], 0), ([3, 1], 1), ([4], 1), ([5], 2)):
        frames = decode_frames(vae, latents, chosen)
        torch.testing.assert_close(frames, whole[:, chosen])
        (slope,) = torch.autograd.grad(frames.sum(), latents)
        assert slope[:, :, last_latent].abs().max() > 0 and not slope[:, :, last_latent + 1 :].any()

"""The losses of DMD2 and of the stages around it: tensors in, tensor out.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width, M marks that the discriminator gives a sample.
"""

import torch
import torch.nn.functional as F


def guided_prediction(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_B: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance on x0 or velocity (Ho and Salimans 2022; guidance 1 is the conditional prediction alone)."""
    # p = u + w (c - u)
    return unconditional + guidance_B.view(-1, 1, 1, 1, 1) * (conditional - unconditional)


def score_difference(real_BCTHW: torch.Tensor, fake_BCTHW: torch.Tensor) -> torch.Tensor:
    """The direction away from the fake score and towards the real one (Yin et al. 2024, eq. 3), without a normaliser."""
    # g = fake - real
    return fake_BCTHW - real_BCTHW


def distribution_matching_gradient(x0_BCTHW: torch.Tensor, real_BCTHW: torch.Tensor, fake_BCTHW: torch.Tensor) -> torch.Tensor:
    """DMD2's gradient on generated latents (Yin et al. 2024, eq. 3, with the normaliser of DMD, eq. 8).

    `x0` is what the generator made, `real` and `fake` are the two scores' x0 of it at the same noise. All `[B, C, T, H, W]`
    in units of clean latents; so is the result.
    """
    # g = (fake - real) / mean_{C,T,H,W} |x0 - real|
    scale_B1111 = (x0_BCTHW - real_BCTHW).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-5)
    return score_difference(real_BCTHW, fake_BCTHW) / scale_B1111


def distribution_matching_loss(gradient_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss whose gradient this is, and its derivative with respect to x0, `[B, C, T, H, W]`."""
    # L = 1/2 mean (x0 - sg(x0 - g))^2 = 1/2 mean g^2, so dL/dx0 = g / numel
    return 0.5 * gradient_BCTHW.square().mean(), gradient_BCTHW / gradient_BCTHW.numel()


def flow_matching_loss(velocity_BCTHW: torch.Tensor, x0_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor) -> torch.Tensor:
    """The fake score's own denoising loss on what the generator makes (Yin et al. 2024, eq. 2, as flow matching)."""
    # L = mean |v - (noise - x0)|^2
    return (velocity_BCTHW - (noise_BCTHW - x0_BCTHW)).square().mean()


def pseudo_huber_loss(prediction_BCTHW: torch.Tensor, target_BCTHW: torch.Tensor, c: float) -> torch.Tensor:
    """A distance that is a square where it is small against `c` (Charbonnier et al. 1997)."""
    # L = mean (sqrt(|p - t|^2 + c^2) - c)
    return ((prediction_BCTHW - target_BCTHW).square() + c**2).sqrt().mean() - c


def regression_loss(x0_BCTHW: torch.Tensor, end_BCTHW: torch.Tensor) -> torch.Tensor:
    """How far the generator lands from where the teacher's path ends (DMD's regression, eq. 9, on latents)."""
    # L = mean |x0 - end|^2
    return (x0_BCTHW - end_BCTHW).square().mean()


def velocity_difference(velocity_BCTHW: torch.Tensor, start_BCTHW: torch.Tensor) -> torch.Tensor:
    """How far a generator has gone from its start: up to a factor of the noise level, the divergence of the two samples that take
    this step from the same point."""
    # L = mean |v - v_start|^2
    return (velocity_BCTHW - start_BCTHW).square().mean()


def generator_gan_loss(fake_marks_BM: torch.Tensor) -> torch.Tensor:
    """What the generator loses to the discriminator (the non-saturating loss of Goodfellow et al. 2014)."""
    # L = mean softplus(-D(fake))
    return F.softplus(-fake_marks_BM).mean()


def discriminator_loss(real_marks_BM: torch.Tensor, fake_marks_BM: torch.Tensor) -> torch.Tensor:
    """The discriminator's own loss (Yin et al. 2024, eq. 4)."""
    # L = mean softplus(-D(real)) + mean softplus(D(fake))
    return F.softplus(-real_marks_BM).mean() + F.softplus(fake_marks_BM).mean()


def approximate_r1(real_marks_BM: torch.Tensor, disturbed_marks_BM: torch.Tensor, strength: float) -> torch.Tensor:
    """The squared slope of the discriminator at real samples, by a difference (R1 of Mescheder et al. 2018 without a second
    derivative, after Lin et al. 2025). `disturbed` are the marks of the same samples with noise of that strength added."""
    # L = mean |D(real) - D(real + strength noise)|^2 / strength^2
    return (real_marks_BM - disturbed_marks_BM).square().mean() / strength**2

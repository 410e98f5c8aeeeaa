"""The losses of DMD2: tensors in, tensor out.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width.
"""

import torch


def guided_x0(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance on x0 (Ho and Salimans 2022; guidance 1 is the conditional prediction alone)."""
    # x0 = u + w (c - u)
    return unconditional + guidance * (conditional - unconditional)


def distribution_matching_gradient(x0_BCTHW: torch.Tensor, real_BCTHW: torch.Tensor, fake_BCTHW: torch.Tensor) -> torch.Tensor:
    """DMD2's gradient on generated latents (Yin et al. 2024, eq. 3, with the normaliser of DMD, eq. 8).

    `x0` is what the generator made, `real` and `fake` are the two scores' x0 of it at the same noise. All `[B, C, T, H, W]`
    in units of clean latents; so is the result.
    """
    # g = (fake - real) / mean_{C,T,H,W} |x0 - real|
    scale_B1111 = (x0_BCTHW - real_BCTHW).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-5)
    return (fake_BCTHW - real_BCTHW) / scale_B1111


def distribution_matching_loss(gradient_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss whose gradient this is, and its derivative with respect to x0, `[B, C, T, H, W]`."""
    # L = 1/2 mean (x0 - sg(x0 - g))^2 = 1/2 mean g^2, so dL/dx0 = g / numel
    return 0.5 * gradient_BCTHW.square().mean(), gradient_BCTHW / gradient_BCTHW.numel()


def flow_matching_loss(velocity_BCTHW: torch.Tensor, x0_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor) -> torch.Tensor:
    """The fake score's own denoising loss on what the generator makes (Yin et al. 2024, eq. 2, as flow matching)."""
    # L = mean |v - (noise - x0)|^2
    return (velocity_BCTHW - (noise_BCTHW - x0_BCTHW)).square().mean()

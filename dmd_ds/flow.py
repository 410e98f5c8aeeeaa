"""Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts the velocity v = noise - x0.

Shape suffixes: B batch, C channels, T latent frames, H W latent height and width. Sigma lies in [0, 1]; a timestep is 1000 sigma.
"""

import torch


def per_sample(value_B: torch.Tensor, like_BCTHW: torch.Tensor) -> torch.Tensor:
    """`[B]` as `[B, 1, 1, ...]`, to be multiplied with a tensor of samples."""
    return value_B.view(-1, *[1] * (like_BCTHW.ndim - 1))


def shift_sigma(sigma, shift: float):
    """Moves noise levels, tensor or number, towards 1: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23); 1 / s moves back."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(x0_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    sigma_B1111 = per_sample(sigma_B, x0_BCTHW)
    return (1 - sigma_B1111) * x0_BCTHW + sigma_B1111 * noise_BCTHW


def x0_from_velocity(x_BCTHW: torch.Tensor, velocity_BCTHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    return x_BCTHW - per_sample(sigma_B, x_BCTHW) * velocity_BCTHW

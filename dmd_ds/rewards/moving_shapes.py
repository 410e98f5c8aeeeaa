"""What the judge of the moving shapes says of colour and motion, made differentiable: logarithms of how likely it is what the
caption asks for, at most 0.

Where the judge counts the pixels that are lit, these weigh each pixel by how surely it is, and where it decides, these compare.

Shape suffixes: B batch, T frames, H W picture height and width.
"""

import torch

from dmd_ds.data.moving_shapes import BACKGROUND, BRIGHT, COLORS, MOTIONS, parse

CONTRAST = (BRIGHT - BACKGROUND) / 255
SOFT = 0.1  # of full contrast: over about so much a pixel goes from unlit to lit
NEAR = 0.1  # of a lit channel: colours so much apart are told apart e to 1
STILL, SWAY = 0.12, 0.03  # of the shorter side: how far a standing shape may stray; paths so much apart are told apart e to 1


def lit(frames_BT3HW: torch.Tensor) -> torch.Tensor:
    """Above the background: 1 is a lit channel."""
    return (frames_BT3HW - BACKGROUND / 255) / CONTRAST


def mask(frames_BT3HW: torch.Tensor) -> torch.Tensor:
    """How surely each pixel is of the shape, `[B, T, H, W]`: brighter than half of the brightest ones."""
    contrast_BTHW = lit(frames_BT3HW).abs().amax(2)
    peak_B = contrast_BTHW.detach().flatten(1).quantile(0.99, dim=1)
    return torch.sigmoid((contrast_BTHW - peak_B[:, None, None, None] / 2) / SOFT)


def color(frames_BT3HW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """`[B]`: log of the likelihood, among the six colours, of the one asked for."""
    frames = frames_BT3HW.float()
    mask_BTHW = mask(frames)
    tint_B3 = (lit(frames) * mask_BTHW.unsqueeze(2)).sum((1, 3, 4)) / mask_BTHW.sum((1, 2, 3))[:, None].clamp_min(1e-6)
    tints_63 = torch.tensor(list(COLORS.values()), dtype=torch.float32, device=frames.device)
    likeness_B6 = tint_B3 @ torch.nn.functional.normalize(tints_63, dim=1).T
    return of_asked(likeness_B6 / NEAR, [list(COLORS).index(parse(prompt).color) for prompt in prompts])


def motion(frames_BT3HW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """`[B]`: log of the likelihood, among the three motions, of the one asked for. Of all frames: one alone stands still."""
    mask_BTHW = mask(frames_BT3HW.float())
    height, width = mask_BTHW.shape[2:]
    total_BT = mask_BTHW.sum((2, 3)).clamp_min(1e-6)
    y_H, x_W = (torch.arange(size, device=mask_BTHW.device) + 0.5 for size in (height, width))
    x_BT = (mask_BTHW.sum(2) * x_W).sum(2) / total_BT
    y_BT = (mask_BTHW.sum(3) * y_H).sum(2) / total_BT
    across_B, down_B = ((track.amax(1) - track.amin(1)) / min(height, width) for track in (x_BT, y_BT))
    still_B = STILL - torch.maximum(across_B, down_B)
    # in the order of MOTIONS; either way, twice as far along as across
    logits_B3 = torch.stack([still_B, across_B - 2 * down_B - STILL, down_B - 2 * across_B - STILL], dim=1) / SWAY
    return of_asked(logits_B3, [MOTIONS.index(parse(prompt).motion) for prompt in prompts])


def of_asked(logits_BN: torch.Tensor, asked: list[int]) -> torch.Tensor:
    chosen_B = torch.tensor(asked, device=logits_BN.device)
    return logits_BN.log_softmax(1).gather(1, chosen_B[:, None])[:, 0]

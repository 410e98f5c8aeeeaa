"""dmd_ds: few-step video generators from Wan2.1, distilled with DMD2 on DeepSpeed ZeRO-3."""

import os

import torch

__version__ = "0.1.0"

if not torch.accelerator.is_available():  # said aloud, DeepSpeed need not guess, nor warn on standard output that it guessed
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

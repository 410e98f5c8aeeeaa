"""Trains recipes in bf16 on the CPU, as accelerators do: python -m tests.distributed.bf16_ranks RECIPE.yaml ..."""

import torch

from dmd_ds import build, start, trainer
from dmd_ds.parallel import engine
from tests.distributed import split_ranks

if __name__ == "__main__":
    for module in (engine, build, start, trainer):
        module.training_dtype = lambda: torch.bfloat16
    split_ranks.main()

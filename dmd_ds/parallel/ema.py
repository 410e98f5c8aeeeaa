"""An exponential moving average of what an engine trains, in fp32, cut over the ranks as ZeRO-3 cuts the weights themselves.

It lies beside the engine's own fp32 partitions, on their device, so an update moves nothing between ranks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch

from dmd_ds.errors import UserError
from dmd_ds.parallel.state import Number, ShardedState

EXCHANGED_AT_ONCE = 2**24  # elements: no second copy of the weights is made for an exchange


def check_can_average(key: str, ds_config: dict[str, Any]) -> None:
    """`UserError` for weights that lie on a disk, where they cannot be averaged in passing, or in bf16 alone, whose steps are too
    coarse for an average."""
    if ds_config.get("bf16", {}).get("bf16_master_weights_and_grads"):
        raise UserError(f"{key}: averages fp32 weights; bf16.bf16_master_weights_and_grads leaves none, give generator.ema_decay=null")
    zero = ds_config["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            raise UserError(f"{key}: averages weights in memory; {part}.device is nvme, give cpu or none")


class ShardedEMA(ShardedState):
    """Starts at the engine's weights; `update` after each of its optimiser steps."""

    kinds = ["average"]

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float):
        super().__init__(engine)
        self.decay = decay
        self.updates = 0
        self.averages = [master.detach().clone() for master in self.optimizer.fp32_partitioned_groups_flat]

    @torch.no_grad()
    def update(self) -> None:
        # The decay grows to its full value: else decay^n of a short run's average is still the model before training (37 % after
        # 100 updates at 0.99). With (1 + n) / (10 + n) the average spans about the last ninth of the updates until then.
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, master in zip(self.averages, self.optimizer.fp32_partitioned_groups_flat, strict=True):
            average.lerp_(master, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the engine's module computes with the averages; afterwards with the trained weights again, bit for bit.

        All ranks enter: weights that are kept whole on each (below ZeRO-3's persistence threshold) are gathered anew.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        optimizer = self.optimizer
        optimizer.checkpoint_event_prologue()  # every weight in its parts, and nowhere whole
        weights = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, self.averages, strict=True)
        for computed_with, master, average in weights:
            for mine, other in zip(master.split(EXCHANGED_AT_ONCE), average.split(EXCHANGED_AT_ONCE), strict=True):
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)
            computed_with.copy_(master)  # in fp32 the two are one buffer
        optimizer.checkpoint_event_epilogue()  # gathers those that are kept whole
        optimizer.invalidate_secondary_tensor()  # the copies inside nodes, of hierarchical partitioning

    @property
    def numbers(self) -> dict[str, Number]:
        return {"updates": self.updates}

    def buffers(self, group: int) -> dict[str, torch.Tensor]:
        return {"average": self.averages[group]}

    def expect(self, group: int, kinds: list[str], numbers: Mapping[str, Number]) -> None:
        self.updates = numbers["updates"]

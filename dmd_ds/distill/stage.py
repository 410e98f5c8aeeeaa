"""What the one loop asks of an algorithm: which engines it trains, and whose turn it is at a step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import deepspeed

from dmd_ds.distill.batch import Batch, Metrics

GENERATOR, FAKE_SCORE = "generator", "fake_score"  # engines go by their sections' names in the recipe


class Turn(NamedTuple):
    """One update of one engine."""

    engine: str
    name: str  # of what is done, for whoever asks where a rank stands
    take: Callable[[Sequence[Batch], int], Metrics]  # of all the batches of a step, and the step


class Stage:
    """An algorithm. Every rank takes the same turns."""

    engines: dict[str, deepspeed.DeepSpeedEngine]

    def turns(self, step: int) -> list[Turn]:
        raise NotImplementedError

"""Every random draw of a run, as a function of (seed, purpose, step, sample) and of nothing else.

No state goes along: a resumed run draws what it would have drawn, the ranks of one sample draw alike without a broadcast,
and 2 ranks of batch 1 draw what 1 rank of batch 2 draws. Numbers are made on the CPU, so every device gets the same ones.
"""

import hashlib
from collections.abc import Sequence

import torch


class Randomness:
    def __init__(self, seed: int):
        self.seed = seed

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        """A fresh CPU generator, keyed by the run's seed, the purpose and the numbers given (step, sample index, ...)."""
        digest = hashlib.blake2b(repr((self.seed, purpose, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int], device="cpu") -> torch.Tensor:
        """Standard normal noise `[len(samples), *shape]`, float32; `samples` are global sample indices."""
        draws = [torch.randn(*shape, generator=self.generator(purpose, step, sample)) for sample in samples]
        return torch.stack(draws).to(device, non_blocking=True)

    def uniform(self, purpose: str, step: int, samples: Sequence[int], device="cpu") -> torch.Tensor:
        """Uniform numbers in [0, 1), `[len(samples)]`, float32."""
        draws = [torch.rand((), generator=self.generator(purpose, step, sample)) for sample in samples]
        return torch.stack(draws).to(device, non_blocking=True)

    def integer(self, purpose: str, step: int, high: int) -> int:
        """One integer in [0, high), the same on every rank."""
        return int(torch.randint(high, (), generator=self.generator(purpose, step)))

    def permutation(self, purpose: str, epoch: int, count: int) -> list[int]:
        """The numbers 0 to count - 1 in random order, the same on every rank."""
        return torch.randperm(count, generator=self.generator(purpose, epoch)).tolist()

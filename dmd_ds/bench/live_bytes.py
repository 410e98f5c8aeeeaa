"""Counts the bytes of all tensors that are alive: what an accelerator's allocator would hold, seen on any device."""

import collections
import traceback
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sees every operation while it is on, and counts each storage from its making to its end.

    `peak` is the most that was alive since `reset`. What an operation allocates and frees inside itself is not seen.
    With `explain` the peak is kept apart by shape and maker, for a reader who wants to know what it is made of.
    """

    def __init__(self, explain: bool = False):
        super().__init__()
        self.live = self.peak = 0
        self.explain = explain
        self.at_peak: list[str] = []
        self._known: dict[int, tuple] = {}
        self._number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, args)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf, func)
        return result

    def _see(self, tensor: torch.Tensor, func) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known or storage.nbytes() == 0:
            return
        nbytes = storage.nbytes()
        self._number += 1
        where = ""
        if self.explain:
            frames = [f for f in traceback.extract_stack(limit=40) if "torch/" not in f.filename and "live_bytes" not in f.filename]
            where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in frames[:-4:-1])
        self._known[address] = (weakref.ref(storage, lambda _: self._gone(address)), nbytes, f"{func} {tuple(tensor.shape)} {where}")
        self.live += nbytes
        if self.live > self.peak:
            self.peak = self.live
            if self.explain:
                self.at_peak = [(size, what) for _, size, what in self._known.values()]

    def _gone(self, address: int) -> None:
        _, nbytes, _ = self._known.pop(address)
        self.live -= nbytes

    def reset(self) -> None:
        self.peak = self.live

    def report(self, least: int = 0) -> str:
        sizes, counts = collections.Counter(), collections.Counter()
        for nbytes, what in self.at_peak:
            sizes[what] += nbytes
            counts[what] += 1
        return "\n".join(f"{size:>12,} {counts[what]:>4} x {what}" for what, size in sizes.most_common() if size >= least)

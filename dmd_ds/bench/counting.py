"""Counts what ranks send each other and what a forward keeps, where it happens: under every caller."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

GATHERED = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_")
REDUCED = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "allreduce_")


class Collectives(TorchDispatchMode):
    """The bytes of every all-gather and reduction of this thread and its backwards, by the phase that it falls into.

    Of a gather what comes out on a rank, of a reduction what goes in: the whole tensor both times. Numbers of the log, below
    `least` bytes, are left out.
    """

    def __init__(self, least: int = 256):
        super().__init__()
        self.least = least
        self.phase = ""
        self.gathered: collections.Counter[str] = collections.Counter()
        self.reduced: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            whole = args[0] if name in GATHERED or name == "allreduce_" else args[1] if name in REDUCED else None
            nbytes = sum(tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(whole) if isinstance(tensor, torch.Tensor))
            if nbytes >= self.least:
                (self.gathered if name in GATHERED else self.reduced)[self.phase] += nbytes
        return func(*args, **(kwargs or {}))

    def during(self, phase: str, function: Callable) -> Callable:
        """The same function, whose collectives count for that phase; an inner phase counts for itself."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return counted


@contextlib.contextmanager
def counting_sent_bytes() -> Iterator[collections.Counter]:
    """Counts what this rank hands to the collectives that attention uses."""
    sent: collections.Counter = collections.Counter()
    all_to_all, batch = dist.all_to_all_single, dist.batch_isend_irecv

    def counted_all_to_all(output, tensor, *args, **kwargs):
        sent["bytes"] += tensor.nbytes
        return all_to_all(output, tensor, *args, **kwargs)

    def counted_batch(operations):
        sent["bytes"] += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch(operations)

    dist.all_to_all_single, dist.batch_isend_irecv = counted_all_to_all, counted_batch
    try:
        yield sent
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = all_to_all, batch


@contextlib.contextmanager
def counting_kept_bytes(module: torch.nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Counts what forwards keep for the backward, each storage once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept

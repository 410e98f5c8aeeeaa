"""What an engine trains, by the names of its parameters: this rank's part of each, as ZeRO-3 cuts it.

A parameter of n elements is flattened and cut into R parts of ceil(n / R), the last padded with zeros. An optimiser keeps its
parts in few flat buffers, DeepSpeed's sub-groups, which may lie on a disk: they are brought in one at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import deepspeed
import torch

MASTER = "master"
Number = int | float


class Part(NamedTuple):
    """Where in a flat buffer this rank's part of a parameter lies."""

    name: str
    shape: tuple[int, ...]  # of the whole
    offset: int
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.narrow(0, self.offset, self.length)


def parts_by_group(engine: deepspeed.DeepSpeedEngine) -> list[list[Part]]:
    names = {parameter.ds_id: name for name, parameter in engine.module.named_parameters()}
    groups = []
    for group in engine.optimizer.fp16_groups:
        parts, offset = [], 0
        for parameter in group:
            parts.append(Part(names[parameter.ds_id], tuple(parameter.ds_shape), offset, parameter.partition_numel()))
            offset += parameter.partition_numel()
        groups.append(parts)
    return groups


class ShardedState:
    """Tensors of several kinds for every parameter that an engine trains, and a few numbers; the part of this rank.

    Subclasses say which kinds there are and where their flat buffers lie.
    """

    kinds: list[str]
    numbers: dict[str, Number]

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.optimizer = engine.optimizer
        self.groups = parts_by_group(engine)

    def in_memory(self, group: int, changes: bool = False) -> contextlib.AbstractContextManager:
        """Within, the sub-group's buffers can be read; `changes`: and what is written into them stays."""
        return contextlib.nullcontext()

    def buffers(self, group: int) -> dict[str, torch.Tensor]:
        """The flat buffers of a sub-group by kind."""
        raise NotImplementedError

    def expect(self, group: int, kinds: list[str], numbers: Mapping[str, Number]) -> None:
        """Makes room in a sub-group for these kinds, and takes the numbers."""
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole parameters."""
        return {part.name: part.shape for parts in self.groups for part in parts}

    def layout(self) -> dict[str, tuple[int, torch.dtype]]:
        """Length and type of each tensor that `tensors` gives, by `kind/name`, in the same order."""
        with self.in_memory(0):
            types = {kind: buffer.dtype for kind, buffer in self.buffers(0).items()}
        return {f"{kind}/{part.name}": (part.length, dtype) for parts in self.groups for kind, dtype in types.items() for part in parts}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Each one `[length]`, where it lies; good until the next is asked for."""
        for group, parts in enumerate(self.groups):
            with self.in_memory(group):
                for buffer in self.buffers(group).values():
                    yield from (part.of(buffer) for part in parts)

    @torch.no_grad()
    def load(self, read: Callable[[str, Part], torch.Tensor], kinds: list[str], numbers: Mapping[str, Number]) -> None:
        """Takes over what `read(kind, part)` gives, and the numbers."""
        for group, parts in enumerate(self.groups):
            with self.in_memory(group, changes=True):
                self.expect(group, kinds, numbers)
                for kind, buffer in self.buffers(group).items():
                    for part in parts:
                        part.of(buffer).copy_(read(kind, part))


class EngineState(ShardedState):
    """The master weights, fp32 where the DeepSpeed JSON keeps them so, and the optimiser's moments; the number is its count of steps."""

    def _state(self, group: int) -> dict:
        return self.optimizer.optimizer.state[self.optimizer.fp32_partitioned_groups_flat[group]]

    @property
    def kinds(self) -> list[str]:
        return list(self.buffers(0))

    @property
    def numbers(self) -> dict[str, Number]:
        return {key: float(value) if torch.is_tensor(value) else value for key, value in self._state(0).items() if key not in self.kinds}

    @contextlib.contextmanager
    def in_memory(self, group: int, changes: bool = False) -> Iterator[None]:
        optimizer = self.optimizer
        is_on_disk = optimizer._swappable_optimizer_subgroup(group)
        if is_on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if changes:  # what is computed with follows; in fp32 the two are one
            optimizer.fp16_partitioned_groups_flat[group].copy_(optimizer.fp32_partitioned_groups_flat[group])
        if is_on_disk and changes:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        elif is_on_disk:
            optimizer._release_swap_buffers(group)

    def buffers(self, group: int) -> dict[str, torch.Tensor]:
        moments = {key: value for key, value in self._state(group).items() if torch.is_tensor(value) and value.dim()}
        return {MASTER: self.optimizer.fp32_partitioned_groups_flat[group].detach(), **moments}

    def expect(self, group: int, kinds: list[str], numbers: Mapping[str, Number]) -> None:
        """As the optimiser that is here now would have made them at its first step; who wrote them may have been another."""
        adam, master = self.optimizer.optimizer, self.buffers(group)[MASTER]
        dtype = torch.float32 if getattr(adam, "fp32_optimizer_states", False) else master.dtype  # DeepSpeed's on the CPU
        moments = {kind: torch.zeros_like(master, dtype=dtype) for kind in kinds if kind != MASTER}
        self._state(group).update({**{key: self._count(value, master.device) for key, value in numbers.items()}, **moments})

    def _count(self, value: Number, device: torch.device) -> int | torch.Tensor:
        """DeepSpeed's optimisers count in an integer, torch's in a tensor of floats, which a fused kernel reads beside the weights."""
        adam = self.optimizer.optimizer
        if type(adam).__module__.startswith("deepspeed."):
            return int(value)
        settings = adam.param_groups[0]
        return torch.tensor(float(value), device=device if settings.get("fused") or settings.get("capturable") else "cpu")

    def load(self, read: Callable[[str, Part], torch.Tensor], kinds: list[str], numbers: Mapping[str, Number]) -> None:
        self.optimizer.checkpoint_event_prologue()  # every weight in its parts, and nowhere whole
        super().load(read, kinds, numbers)
        self.optimizer.checkpoint_event_epilogue()  # gathers those that are kept whole
        self.optimizer.invalidate_secondary_tensor()  # the copies inside nodes, of hierarchical partitioning

"""The state of an engine on disk: a file a rank, from which any number of ranks reads.

    parameters.json               how many ranks wrote, the kinds of tensors, a few numbers, the parameters' shapes
    rank_00000.safetensors ...    each rank's part of every tensor: `kind/parameter`, flat, ceil(n / ranks) of its n elements

The kinds of an engine are `master`, its weights, and what its optimiser calls its moments (`exp_avg`, `exp_avg_sq`); the kind
of an average of weights is `average`. Nothing in it can run code.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open

from dmd_ds.errors import UserError, read_json
from dmd_ds.parallel.state import ShardedState
from dmd_ds.recipe import validated
from dmd_ds.section import NotNegative, Positive, Section
from dmd_ds.wan.tensors import Spec, read_header, write_safetensors

PARAMETERS = "parameters.json"


class Parameters(Section):
    ranks: Positive
    kinds: list[str] = Field(min_length=1)
    numbers: dict[str, int | float]
    shapes: dict[str, tuple[NotNegative, ...]]


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class PartFile:
    """What a rank writes into `folder` of a state. `copy`: of the state as it is now, in the host's memory, so that training may
    go on before it is written."""

    def __init__(self, state: ShardedState, folder: Path, rank: int, ranks: int, copy: bool):
        self.file, self.parameters = folder / rank_file(rank), None
        if rank == 0:
            self.parameters = Parameters(ranks=ranks, kinds=state.kinds, numbers=state.numbers, shapes=state.shapes)
        self.specs = {key: Spec((length,), dtype) for key, (length, dtype) in state.layout().items()}
        self.tensors: Iterator[torch.Tensor] = state.tensors()
        if copy:
            self.tensors = iter([tensor.to("cpu", copy=True) for tensor in state.tensors()])

    def write(self) -> list[Path]:
        """The files it wrote."""
        write_safetensors(self.file, self.specs, (tensor.cpu() for tensor in self.tensors))
        if self.parameters is None:
            return [self.file]
        about = self.file.with_name(PARAMETERS)
        about.write_text(json.dumps(self.parameters.model_dump(mode="json"), indent=1) + "\n")
        return [about, self.file]


class Shards:
    """A folder of them, read a tensor at a time; never more than one is held. `UserError` names what is missing or does not fit."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / PARAMETERS).is_file():
            raise UserError(f"{folder}: holds no weights of a checkpoint ({PARAMETERS} is missing)")
        about = validated(Parameters, read_json(folder / PARAMETERS), str(folder / PARAMETERS))
        self.shapes, self.kinds, self.numbers, self.ranks = about.shapes, about.kinds, about.numbers, about.ranks
        here = len(list(folder.glob("rank_*.safetensors")))
        if here != about.ranks:
            raise UserError(f"{folder}: {here} rank files of {about.ranks}")
        files = [folder / rank_file(rank) for rank in range(about.ranks)]
        for file in files:
            self._check(file)
        self.opened = [safe_open(file, framework="pt") for file in files]

    def _check(self, file: Path) -> None:
        found = {key: tensor.shape for key, tensor in read_header(file).items()}
        for kind in self.kinds:
            for name in self.shapes:
                if found.get(f"{kind}/{name}") != (self._length(name, self.ranks),):
                    shape = list(found.get(f"{kind}/{name}", ()))
                    raise UserError(f"{file}: {kind}/{name} is {shape or 'missing'}, expected [{self._length(name, self.ranks)}]")

    def _length(self, name: str, ranks: int) -> int:
        """Elements of a parameter's part on so many ranks."""
        return -(-math.prod(self.shapes[name]) // ranks)

    def part(self, kind: str, name: str, rank: int, ranks: int) -> torch.Tensor:
        """The part of a parameter that belongs to one of so many ranks, flat, padded with zeros."""
        length, stored = self._length(name, ranks), self._length(name, self.ranks)
        first, end = rank * length, min((rank + 1) * length, math.prod(self.shapes[name]))
        pieces = []
        for writer in range(first // stored, -(-end // stored)) if first < end else ():
            offset = writer * stored
            pieces.append(self.opened[writer].get_slice(f"{kind}/{name}")[max(first - offset, 0) : min(end - offset, stored)])
        whole = torch.cat(pieces) if pieces else torch.zeros(0)
        return torch.nn.functional.pad(whole, (0, length - len(whole)))

    def read(self, name: str) -> torch.Tensor:
        """The whole weight, or its average, in fp32."""
        return self.part(self.kinds[0], name, 0, 1).view(self.shapes[name]).float()

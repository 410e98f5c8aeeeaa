"""Which rank does what: one object, made once and handed down.

For now every rank is a data rank: each holds whole samples of its own.
"""

import dataclasses
import os
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclasses.dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def samples(self, batch_size: int) -> list[int]:
        """This rank's places in the global batch, given its own batch size."""
        return list(range(self.data_rank * batch_size, (self.data_rank + 1) * batch_size))

    def all_gather_objects(self, value: object) -> list[object]:
        """Every rank's value, in rank order, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_objects(self, value: object) -> list[object] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def barrier(self) -> None:
        dist.barrier()


def world_size() -> int:
    """Ranks of this job, known from the environment before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", 1))


def make_mesh() -> Mesh:
    """Joins the ranks of this job (a lone process becomes a world of one) and lays the mesh over them."""
    # DeepSpeed calls collectives by names that torch renames; torch would say so at each of thousands of calls
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*is deprecated", category=FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # Else DeepSpeed compiles a shared-memory all-reduce for a minute, at the first run of every environment.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        os.environ.setdefault(name, str(value))
    deepspeed.init_distributed(verbose=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    return Mesh(rank=rank, world_size=size, data_rank=rank, data_size=size, device=device)

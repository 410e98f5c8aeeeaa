"""Which rank does what: data x ring x Ulysses, one object, made once and handed down.

Ranks are laid out as xDiT lays them: `ulysses` neighbours share a block of a sample's tokens, `ring` such blocks are a sample,
and the samples of a batch go over what is left. ZeRO-3 shards over all ranks alike.
"""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from yunchang.globals import PROCESS_GROUP, set_seq_parallel_pg

from dmd_ds.errors import RunError, UserError, report
from dmd_ds.parallel.hosts import RollCall, check_slots, host_of_rank, machine, naming_the_lost
from dmd_ds.recipe import Parallel


@dataclasses.dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    device: torch.device
    ulysses: int
    ring: int
    ulysses_group: dist.ProcessGroup
    ring_group: dist.ProcessGroup
    sequence_group: dist.ProcessGroup  # all ranks of one sample
    mark: Callable[[str], None]  # progress: what this rank begins to do now

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def sequence_size(self) -> int:
        return self.ulysses * self.ring

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.sequence_size

    @property
    def leads_sample(self) -> bool:
        """Of the ranks that share a sample, one writes it down."""
        return self.rank % self.sequence_size == 0

    def samples(self, batch_size: int) -> list[int]:
        """This rank's places in the global batch, given its own batch size."""
        return list(range(self.data_rank * batch_size, (self.data_rank + 1) * batch_size))

    def all_gather_objects(self, value: object) -> list[object]:
        """Every rank's value, in rank order, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_objects(self, value: object) -> list[object] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere.

        They pass through the accelerators' memory one at a time, rank 0's own not at all: of videos all at once might not fit.
        """
        values = [value]
        for rank in range(1, self.world_size):
            box = [value if rank == self.rank else None]
            dist.broadcast_object_list(box, src=rank)
            if self.is_first:
                values.append(box[0])
        return values if self.is_first else None

    def barrier(self) -> None:
        dist.barrier()


def world_size() -> int:
    """Ranks of this job, known from the environment before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_degrees(parallel: Parallel, heads: int) -> None:
    """`UserError` with the arithmetic for degrees that this job or this model cannot be split by."""
    ulysses, ring, ranks = parallel.ulysses, parallel.ring, world_size()
    if heads % ulysses:
        fits = ", ".join(str(degree) for degree in range(1, min(heads, 16) + 1) if heads % degree == 0)
        raise UserError(f"parallel.ulysses={ulysses} does not divide the {heads} attention heads of the model; try one of {fits}")
    if ranks % (ulysses * ring):
        raise UserError(
            f"parallel.ulysses={ulysses} x parallel.ring={ring} = {ulysses * ring} does not divide the {ranks} ranks of this job"
        )


def check_one_machine_a_sample(machines: list[str], size: int) -> None:
    """`UserError` when the ranks of one sample lie on two machines; `machines` names each rank's, in rank order."""
    for first in range(0, len(machines), size):
        if len(set(machines[first : first + size])) > 1:
            slots = machines.count(machines[first])
            raise UserError(
                f"ranks {first} to {first + size - 1} share a sample (parallel.ulysses x parallel.ring = {size}) but not a machine: "
                f"{host_of_rank(first)} has {slots} ranks; let {size} divide the slots of every host in the hostfile"
            )


@contextlib.contextmanager
def importable_xfuser():
    """xfuser 0.7 imports only while torch names a CUDA version, and wants a driver while it does so afterwards: without a GPU torch
    names none then, not even a build for CUDA. What it cannot use it need not tell."""
    os.environ.setdefault("LOG_LEVEL", "warning")  # xfuser's, read at its import
    named, verbosity = torch.version.cuda, transformers.logging.get_verbosity()
    torch.version.cuda = named or "12.8"
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        torch.version.cuda = named if torch.cuda.is_available() else None
        transformers.logging.set_verbosity(verbosity)


def sample_groups(parallel: Parallel, rank: int, local_rank: int, size: int, backend: str) -> dict[str, dist.ProcessGroup]:
    """xDiT's groups of the ranks that share this rank's sample: all of them, those of its Ulysses, those of its ring."""
    with importable_xfuser():
        from xfuser.core import distributed as xdit
    a_sample = parallel.ulysses * parallel.ring
    xdit.init_distributed_environment(size, rank, local_rank=local_rank, backend=backend)
    xdit.initialize_model_parallel(
        data_parallel_degree=size // a_sample,
        sequence_parallel_degree=a_sample,
        ulysses_degree=parallel.ulysses,
        ring_degree=parallel.ring,
        backend=backend,
    )
    if PROCESS_GROUP.ULYSSES_PG is None:  # without a GPU xfuser leaves this part out
        set_seq_parallel_pg(parallel.ulysses, parallel.ring, rank, size)
    return {
        "sequence_group": xdit.get_sp_group().device_group,
        "ulysses_group": PROCESS_GROUP.ULYSSES_PG,
        "ring_group": PROCESS_GROUP.RING_PG,
    }


@contextlib.contextmanager
def ending_at_once():
    """A process of a job that fails ends with its one line, and without the interpreter's farewell.

    A thread of a process group that lets go of its last tensor during that ends the process with SIGABRT (seen once in 150
    exits), and a group whose peers are gone may keep it waiting.
    """
    try:
        yield
    except (UserError, RunError) as error:
        code = report(error)
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def joined(parallel: Parallel):
    """Joins the ranks of this job (a lone process becomes a world of one), lays the mesh over them, and parts at the end.

    A rank that goes away in between is named in the line that the others end with.
    """
    # DeepSpeed calls collectives by names that torch renames; torch would say so at each of thousands of calls
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*is deprecated", category=FutureWarning)
    kind = get_accelerator().device_name()
    if kind == "cpu":
        # Else DeepSpeed compiles a shared-memory all-reduce for a minute, at the first run of every environment.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(value))
    check_slots()
    rank, size, local_rank = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if kind != "cpu":
        count = get_accelerator().device_count()
        if local_rank >= count:
            raise UserError(f"{host_of_rank(rank)} has {count} accelerators, and slots for at least {local_rank + 1} in the hostfile")
        get_accelerator().set_device(local_rank)
    backend = get_accelerator().communication_backend_name()
    with contextlib.closing(RollCall(rank, size, parallel.join_timeout, parallel.hang_timeout)) as roll_call:
        roll_call.wait_for_all()
        with ending_at_once(), naming_the_lost(roll_call):
            timeout = timedelta(seconds=2 * parallel.hang_timeout)  # of a collective; the roll call is to speak first
            # xfuser and DeepSpeed name no time for the groups that they make; NCCL would give those ten minutes
            dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
            dist.init_process_group(backend, timeout=timeout, store=dist.PrefixStore("world", roll_call.store), rank=rank, world_size=size)
            deepspeed.init_distributed(verbose=False)
            mesh = Mesh(
                rank=rank,
                world_size=size,
                device=torch.device(get_accelerator().device_name(local_rank)),
                ulysses=parallel.ulysses,
                ring=parallel.ring,
                mark=roll_call.mark,
                **sample_groups(parallel, rank, local_rank, size, backend),
            )
            check_one_machine_a_sample(mesh.all_gather_objects(machine()), mesh.sequence_size)
            yield mesh
        dist.destroy_process_group()

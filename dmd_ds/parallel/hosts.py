"""Which machines a job runs on, whether all of its ranks have come, and which of them is gone.

`deepspeed` hands the hosts of its hostfile to the process that starts a machine's ranks, as an argument; it is read there.
Under another launcher the machines' own names stand in.
"""

import base64
import binascii
import contextlib
import faulthandler
import functools
import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from dmd_ds.errors import RunError, UserError, read_text, report

Slots = dict[str, int]  # host -> ranks


def argument(process: psutil.Process, name: str) -> str | None:
    """The value of `--name value` or `--name=value` (or `-H value`) in a process's command line."""
    words = process.cmdline()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in (f"--{name}", f"-{name}"):
            return following
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


@functools.cache
def launched_slots() -> Slots | None:
    """The hosts and the ranks on each that the deepspeed launcher was told of; None under another launcher."""
    with contextlib.suppress(psutil.Error, ValueError, binascii.Error):
        world_info = argument(psutil.Process().parent(), "world_info")
        if world_info:
            return {host: len(ranks) for host, ranks in json.loads(base64.urlsafe_b64decode(world_info)).items()}
    return None


def hostfile_slots() -> tuple[str, Slots] | None:
    """The hostfile of the deepspeed command above this process, and what it offers; None where there is none to be seen."""
    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents():
            path = argument(ancestor, "hostfile") or argument(ancestor, "H")
            if path and os.path.isfile(os.path.join(ancestor.cwd(), path)):
                return path, read_hostfile(Path(ancestor.cwd(), path))
    return None


def launchers() -> list[psutil.Process]:
    """The deepspeed commands above this process on this machine; none under another launcher."""
    with contextlib.suppress(psutil.Error):
        above = [(process, process.cmdline()) for process in psutil.Process().parents()]
        return [p for p, words in above if argument(p, "world_info") or any(os.path.basename(word) == "deepspeed" for word in words[:2])]
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def read_hostfile(path: Path) -> Slots:
    """A line a machine, `name slots=N`; `UserError` names the line."""
    slots: Slots = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or not re.fullmatch(r"slots=[0-9]{1,6}", words[1]):
            raise UserError(f"{path}:{number}: {line.strip()!r} is not of the form `name slots=N`")
        if words[0] in slots:
            raise UserError(f"{path}:{number}: {words[0]} comes twice")
        slots[words[0]] = int(words[1].removeprefix("slots="))
    if not slots:
        raise UserError(f"{path}: names no machine")
    return slots


def check_slots() -> None:
    """`UserError` when the command asks for more ranks on a host than its hostfile has slots there."""
    launched, offered = launched_slots(), hostfile_slots()
    if not launched or not offered:
        return
    path, slots = offered
    for host, ranks in launched.items():
        if host in slots and ranks > slots[host]:
            raise UserError(f"{path}: {host} has {slots[host]} slots, {ranks} ranks were asked for there")


def host_of_rank(rank: int) -> str:
    """The host of a rank as the hostfile calls it; this machine's name under another launcher."""
    for host, ranks in (launched_slots() or {}).items():
        if rank < ranks:
            return host
        rank -= ranks
    return socket.gethostname()


def machine() -> str:
    """What tells this machine from the others of the job: its place in the launcher's list, else its name."""
    for name in ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"):  # deepspeed, torchrun, srun
        if name in os.environ:
            return f"{name} {os.environ[name]}"
    return socket.gethostname()


class RollCall:
    """Where the ranks of a job meet: a store on rank 0's machine, in which every rank counts up until it closes its call.

    A rank that is about to end closes first: the interpreter must not go away under a thread that is inside the store.
    Once it has marked its progress, a rank that marks none for `hang_timeout_s` ends, and says which of all ranks stands.
    A rank whose launcher is gone asks itself to end with SIGTERM: nobody watches the job any more, and another may be started.
    """

    BEAT_S = 0.5
    LISTEN_S = 8.0  # long enough for a rank that is busy, short enough for one who waits

    def __init__(self, rank: int, world_size: int, timeout_s: float, hang_timeout_s: float):
        self.rank, self.world_size, self.timeout_s, self.hang_timeout_s = rank, world_size, timeout_s, hang_timeout_s
        self._marks, self._doing, self._marked_at = 0, "start", math.inf
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            self.store = dist.TCPStore(address, port, world_size, rank == 0, timedelta(seconds=timeout_s), wait_for_workers=False)
        except dist.DistError as error:
            what = "cannot be opened" if rank == 0 else f"did not answer within {timeout_s:g} s"
            raise UserError(f"{address}:{port}, where the ranks meet, {what}: {str(error).splitlines()[0]}") from error
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, name="roll call", daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def mark(self, doing: str) -> None:
        """Progress: what this rank begins to do now."""
        self._marks, self._doing, self._marked_at = self._marks + 1, doing, time.monotonic()

    def wait_for_all(self) -> None:
        """Returns when every rank has come; `UserError` names those that have not when the time is up."""
        deadline = time.monotonic() + self.timeout_s
        missing = range(self.world_size)
        while missing := [rank for rank in missing if not self.store.check([self._key(rank)])]:
            if time.monotonic() > deadline:
                raise UserError(f"no answer within {self.timeout_s:g} s (parallel.join_timeout) from {self._named(missing)}")
            time.sleep(0.2)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(self.LISTEN_S)  # a store that is out of reach may keep it longer; then the job has failed anyway

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"

    def _beat(self) -> None:
        store = self.store.clone()  # a connection of its own: the main thread may wait in the other
        told = None
        with contextlib.suppress(dist.DistError):  # rank 0 is gone, and the store with it
            store.add(self._key(self.rank), 1)
            while not self._closed.wait(self.BEAT_S):
                store.add(self._key(self.rank), 1)
                if self._marks != told:
                    told = self._marks
                    store.set(self._progress_key(self.rank), f"{told} {self._doing}")

    @staticmethod
    def _progress_key(rank: int) -> str:
        return f"progress/{rank}"

    def _watch(self) -> None:
        store, above = self.store.clone(), launchers()
        while not self._closed.wait(self.BEAT_S):
            if time.monotonic() - self._marked_at > self.hang_timeout_s:
                self._end(store)
            if not all(map(is_alive, above)):
                above = []
                os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, store: dist.Store) -> None:
        standing = [f"{self._named([0])} does not answer"]  # unless the store, which is there, does
        asking = threading.Thread(target=lambda: standing.append(self._standing(store)), daemon=True)
        asking.start()
        asking.join(3 * self.LISTEN_S)
        waited = f"no progress for {self.hang_timeout_s:g} s (parallel.hang_timeout)"
        report(RunError(f"{waited}: {standing[-1]}; the same command resumes the run"))
        faulthandler.dump_traceback()  # where this one is, for whoever wants to know why
        os._exit(1)

    def _standing(self, store: dist.Store) -> str:
        """Names the ranks that hold up the others: those that do nothing at all any more, else those that have come least far."""
        if lost := self._lost(store):
            return f"{lost} does not answer"
        progress = [store.get(self._progress_key(rank)).decode().split(" ", 1) for rank in range(self.world_size)]
        least = min(int(marks) for marks, _ in progress)
        behind = [rank for rank, (marks, _) in enumerate(progress) if int(marks) == least]
        who = "all ranks stand" if len(behind) == self.world_size else f"{self._named(behind)} stands"
        return f"{who} at {progress[behind[0]][1]!r}"

    def _named(self, ranks: Iterable[int]) -> str:
        return ", ".join(f"rank {rank} on {host_of_rank(rank)}" for rank in ranks)

    def lost(self) -> str:
        """After a collective failed: names the ranks that no longer count up; empty when all do."""
        return self._lost(self.store)

    def _lost(self, store: dist.Store) -> str:
        try:
            before = [store.add(self._key(rank), 0) for rank in range(self.world_size)]
            time.sleep(self.LISTEN_S)
            if store.check(["lost"]):  # who asked first has ended by now, and would be taken for lost
                return store.get("lost").decode()
            still = [rank for rank, count in enumerate(before) if store.add(self._key(rank), 0) == count]
            if still:
                store.set("lost", self._named(still))
            return self._named(still)
        except dist.DistError:
            return self._named([0])


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective failed, as opposed to anything on this rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def naming_the_lost(roll_call: RollCall):
    """Turns the failure of a collective into a RunError that says which rank went away."""
    try:
        yield
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        lost = roll_call.lost()
        if not lost:
            raise
        raise RunError(f"{lost} is gone, and the job with it; its own output says why, the same command resumes the run") from error

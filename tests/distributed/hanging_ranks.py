"""What test_faults.py runs on some ranks: python -m tests.distributed.hanging_ranks (stopped | busy) RANK

All ranks make progress; then one is stopped from outside, or is busy with something that does not end, and the others wait for it.
"""

import os
import signal
import sys
import time

from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel


def main() -> None:
    how, who = sys.argv[1], int(sys.argv[2])
    with joined(Parallel(hang_timeout=3.0)) as world:
        world.mark("step 1: batch")
        world.barrier()
        if world.rank == who and how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.rank == who and how == "busy":
            time.sleep(600)
        world.mark("step 1: generator")
        world.barrier()


if __name__ == "__main__":
    main()

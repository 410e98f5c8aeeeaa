"""Jobs of ranks on this machine, one measurement each."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

from dmd_ds.errors import RunError

RECORD = "record: "


def run_ranks(part: str, ranks: int, **arguments: Any) -> Any:
    """What `on_rank(**arguments)` of that part returns on rank 0 of a job of its own; `RunError` when a rank fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "dmd_ds.bench.rank", part, json.dumps(arguments)]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RunError(f"bench {part} {arguments}: a rank of {ranks} failed, see above")
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith(RECORD)).removeprefix(RECORD))

"""One rank of a job that `dmd_ds.bench.ranks` starts: `python -m dmd_ds.bench.rank PART ARGUMENTS`."""

import json
import logging
import sys

from dmd_ds.bench import data, gather, infer, load, memory, recipe, scale, sequence, step, utilisation
from dmd_ds.bench.ranks import RECORD

PARTS = {
    "data": data, "gather": gather, "infer": infer, "load": load, "memory": memory, "recipe": recipe, "scale": scale,
    "sequence": sequence, "step": step, "utilisation": utilisation,
}  # fmt: skip


def main(part: str, arguments: str) -> None:
    logging.disable(logging.WARNING)
    found = PARTS[part].on_rank(**json.loads(arguments))
    print(RECORD + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Random weights of a published size stream from disk into ZeRO-3: a rank's part, and the most that its resident memory grew.

Pages of mapped files are counted.
"""

import tempfile
from pathlib import Path

from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import transformer_config, write_model
from dmd_ds.build import sharded_transformer
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.sizes import PUBLISHED, ModelSize
from dmd_ds.recipe import Data, Generator, Parallel


def memory_line(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def on_rank(folder: str, size: dict) -> list[dict[str, float]]:
    """Of every rank: bytes of its part, of the largest whole tensor, and of what its resident memory grew by at most."""
    with joined(Parallel()) as mesh:
        generator, model = Generator(lr=1e-6), ModelSize(**size)
        ds_config = complete_ds_config(read_ds_config("generator.ds_config", generator.ds_config), generator, Data(path="none"), model)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = memory_line("VmRSS")
        transformer = sharded_transformer(Path(folder), transformer_config(model), "none", 0, ds_config)
        grown = memory_line("VmHWM") - before
        parameters = list(transformer.parameters())
        part = sum(parameter.ds_tensor.nbytes for parameter in parameters)
        largest = max(parameter.ds_numel * parameter.element_size() for parameter in parameters)
        return mesh.all_gather_objects({"part": part, "largest": largest, "grown": grown})


def measure_size(size: ModelSize, ranks: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), size)
        return run_ranks("load", ranks, folder=folder, size=size.__dict__)


def measure(model: str, ranks: int) -> list[dict[str, float]]:
    return measure_size(PUBLISHED[model], ranks)


def table(rows: list[dict[str, float]]) -> str:
    lines = ["| rank | part, MB | peak growth, MB | over the part, MB | largest tensor, MB |", "|---" * 5 + "|"]
    for rank, row in enumerate(rows):
        numbers = (row["part"], row["grown"], row["grown"] - row["part"], row["largest"])
        lines.append(f"| {rank} | " + " | ".join(f"{number / 1e6:.0f}" for number in numbers) + " |")
    return "\n".join(lines)

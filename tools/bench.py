#!/usr/bin/env python3
"""Measures what this project costs, as ratios that hold on any machine.

    python tools/bench.py sp [--tokens 1280] [--out outputs/bench]
    python tools/bench.py load [--model 1.3b] [--ranks 2]

sp: one sample over 1, 2 and 4 ranks, by Ulysses, by ring and by both. Counted on rank 0, a transformer block: the bytes its
forward keeps for the backward (without activation checkpointing), and the bytes it hands to the collectives.

load: random weights of a published size stream from disk into ZeRO-3. Of each rank: the bytes of its part, and the most that its
resident memory grew while it was loading, pages of mapped files counted.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel

from dmd_ds.build import sharded_transformer
from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.sizes import PUBLISHED, ModelSize
from dmd_ds.recipe import Data, Generator, Parallel
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.tensors import Spec, save_weights
from dmd_ds.wan.weights import transformer_config

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]  # Ulysses, ring
BLOCKS, HEADS, HEAD_DIM, TEXT_TOKENS = 2, 4, 64, 8
RECORD = "record: "


@dataclasses.dataclass(frozen=True)
class Closed:
    """Bytes a rank sends a block in float32, from the sizes alone. L tokens, D width, U Ulysses, R ring."""

    tokens: int
    width: int
    ulysses: int
    ring: int

    @property
    def forward(self) -> float:
        # queries, keys, values and result change hands once; keys and values pass R - 1 times on
        all_to_all = 4 * self.tokens * self.width / (self.ulysses * self.ring) if self.ulysses > 1 else 0
        ring = 2 * self.tokens * self.width / self.ulysses * (self.ring - 1) / self.ring
        return 4 * (all_to_all + ring)

    @property
    def backward(self) -> float:
        # the same again, and the gradients of keys and values pass R times: home at last
        gradients = 2 * self.tokens * self.width / self.ulysses if self.ring > 1 else 0
        return self.forward + 4 * gradients


@contextlib.contextmanager
def counting_sent_bytes():
    """Counts what this rank hands to the collectives that attention uses."""
    sent = collections.Counter()
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
def counting_kept_bytes(module: torch.nn.Module):
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


def measure_sp(parallel: Parallel, tokens: int) -> dict[str, float]:
    """One rank's part: a block's bytes, from a model of BLOCKS and one of twice as many, so that what is no block cancels."""
    with joined(parallel) as mesh:
        numbers = []
        for blocks in (BLOCKS, 2 * BLOCKS):
            torch.manual_seed(0)
            transformer = WanTransformer3DModel(
                num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=64, freq_dim=64, ffn_dim=4 * HEADS * HEAD_DIM,
                num_layers=blocks,
            )  # fmt: skip
            model = WanDenoiser(transformer, SequenceParallel(mesh, torch.float32))
            x_BCTHW = torch.randn(1, 16, 4, 2, tokens // 2)  # 4 x 1 x tokens / 4 patches
            with counting_sent_bytes() as sent:
                with counting_kept_bytes(model) as kept:
                    out = model(x_BCTHW, torch.tensor([0.5]), torch.randn(1, TEXT_TOKENS, 64))
                kept_bytes, forward = sum(storage.nbytes() for storage in kept.values()), sent["bytes"]
                out.sum().backward()
                numbers.append((kept_bytes, forward, sent["bytes"] - forward))
        kept_bytes, forward, backward = ((late - early) / BLOCKS for early, late in zip(*numbers, strict=True))
        return {"kept": kept_bytes, "forward": forward, "backward": backward}


def memory_line(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def write_random_model(folder: Path, size: ModelSize) -> None:
    """The transformer of a diffusers folder, bf16."""
    (folder / "transformer").mkdir(parents=True)
    config = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": size.heads, "attention_head_dim": size.head_dim,
        "ffn_dim": size.ffn, "num_layers": size.layers, "in_channels": size.in_channels, "out_channels": size.out_channels,
        "text_dim": size.text_dim, "freq_dim": size.freq_dim, "patch_size": size.patch,
    }  # fmt: skip
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in WanTransformer3DModel.from_config(config).named_parameters()}
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    save_weights(folder / "transformer", specs, lambda name: torch.randn(shapes[name], dtype=torch.bfloat16))


def measure_load(model: Path) -> list[dict[str, float]]:
    """Of every rank: bytes of its part, of the largest whole tensor, and of what its resident memory grew by at most."""
    with joined(Parallel()) as mesh:
        generator = Generator(lr=1e-6)
        ds_config = complete_ds_config(read_ds_config("generator.ds_config", generator.ds_config), generator, Data(path="none"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = memory_line("VmRSS")
        transformer = sharded_transformer(model, transformer_config(model), "none", 0, ds_config)
        grown = memory_line("VmHWM") - before
        parameters = list(transformer.parameters())
        part = sum(parameter.ds_tensor.nbytes for parameter in parameters)
        largest = max(parameter.ds_numel * parameter.element_size() for parameter in parameters)
        return mesh.all_gather_objects({"part": part, "largest": largest, "grown": grown})


def bench_load(size: str, ranks: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), PUBLISHED[size])
        return run_ranks(ranks, "load", "--folder", folder)


def load_table(rows: list[dict[str, float]]) -> str:
    lines = [f"{'rank':>5}{'part MB':>10}{'peak growth MB':>16}{'over the part MB':>18}{'largest tensor MB':>19}"]
    for rank, row in enumerate(rows):
        over = row["grown"] - row["part"]
        lines.append(f"{rank:>5}{row['part'] / 1e6:>10.0f}{row['grown'] / 1e6:>16.0f}{over / 1e6:>18.0f}{row['largest'] / 1e6:>19.0f}")
    return "\n".join(lines)


def run_ranks(ranks: int, *arguments: str) -> Any:
    """The record of rank 0, of a job of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, *arguments]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError(f"{' '.join(arguments)}: a rank failed, see above")
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith(RECORD)).removeprefix(RECORD))


def run_layout(ulysses: int, ring: int, tokens: int) -> dict[str, float]:
    return run_ranks(ulysses * ring, "sp", "--tokens", str(tokens), "--one", str(ulysses), str(ring))


def bench_sp(tokens: int) -> list[dict[str, float]]:
    if tokens % 4:
        raise UserError(f"--tokens {tokens}: must divide by 4, or padding is counted too")
    rows = []
    for ulysses, ring in LAYOUTS:
        found = run_layout(ulysses, ring, tokens)
        closed = Closed(tokens, HEADS * HEAD_DIM, ulysses, ring)
        row = {"ulysses": ulysses, "ring": ring, **found}
        whole = rows[0]["kept"] if rows else found["kept"]
        row["kept_ratio"] = found["kept"] / (whole / (ulysses * ring))
        for way in ("forward", "backward"):
            row[f"{way}_ratio"] = found[way] / getattr(closed, way) if getattr(closed, way) else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    head = f"{'ulysses':>8}{'ring':>5}{'kept MB':>10}{'x P / whole':>12}{'sent MB':>10}{'/ closed':>9}{'back MB':>10}{'/ closed':>9}"
    lines = [head]
    for row in rows:
        cells = [f"{row['ulysses']:>8}{row['ring']:>5}{row['kept'] / 1e6:>10.3f}{row['kept_ratio']:>12.3f}"]
        for way in ("forward", "backward"):
            ratio = row[f"{way}_ratio"]
            cells.append(f"{row[way] / 1e6:>10.3f}" + (f"{ratio:>9.3f}" if ratio is not None else f"{'-':>9}"))
        lines.append("".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("part", choices=["sp", "load"], help="what is measured")
    parser.add_argument("--tokens", type=int, default=1280, help="of sp")
    parser.add_argument("--model", choices=PUBLISHED, default="1.3b", help="of load: its random weights are written to a temporary folder")
    parser.add_argument("--ranks", type=int, default=2, help="of load")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="where the numbers go, as JSON")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)  # a rank of one layout
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # a rank that loads
    a = parser.parse_args()
    with one_line_errors():
        if a.one:
            print(RECORD + json.dumps(measure_sp(Parallel(ulysses=a.one[0], ring=a.one[1]), a.tokens)))
            return
        if a.folder:
            print(RECORD + json.dumps(measure_load(a.folder)))
            return
        if a.part == "load":
            rows = bench_load(a.model, a.ranks)
            a.out.mkdir(parents=True, exist_ok=True)
            (a.out / "load.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{load_table(rows)}\n{a.out / 'load.json'}")
            return
        rows = bench_sp(a.tokens)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "sp.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"a block of width {HEADS * HEAD_DIM}, {a.tokens} tokens, float32, batch 1; P = ulysses x ring")
    print(table(rows))
    print(f"closed form: forward 4 L D / P by all-to-all, 2 L D (R - 1) / (U R) by ring\n{a.out / 'sp.json'}")


if __name__ == "__main__":
    main()

"""What a run was started with, written down once a command: the machines, the versions, the memory that was planned."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from dmd_ds import __version__
from dmd_ds.errors import read_json_mapping
from dmd_ds.inputs import Inputs
from dmd_ds.parallel.engine import training_dtype
from dmd_ds.parallel.hosts import host_of_rank
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.planner.memory import Memory, memory
from dmd_ds.planner.sizes import ModelSize, Precision, Video, setup_of
from dmd_ds.recipe import validated
from dmd_ds.wan.diffusers_parts import Autoencoder
from dmd_ds.wan.original_parts import is_original

STARTS = "starts.jsonl"
GB = 1e9
PACKAGES = ("torch", "deepspeed", "xfuser", "yunchang", "diffusers", "transformers", "peft", "safetensors", "triton")


def planned_memory(inputs: Inputs, prompt_tokens: int, ranks: int) -> Memory:
    """Of the fullest rank, in the precision that is trained in here; without validation where the planner knows not the autoencoder."""
    frames, height, width = (int(inputs.video[key]) for key in ("frames", "height", "width"))
    dtype = training_dtype()
    setup = setup_of(
        inputs.recipe,
        ModelSize.from_config(inputs.transformer_config),
        Video(frames, height, width),
        ranks,
        inputs.ds_configs,
        text_tokens=prompt_tokens,
        precision=Precision(dtype.itemsize, accelerator=dtype != torch.float32),
    )
    return memory(dataclasses.replace(setup, validation=setup.validation and has_wans_autoencoder(inputs.model)))


def has_wans_autoencoder(model: Path) -> bool:
    """Whether it is as wide as Wan2.1's own, of which the planner knows the weights."""
    if is_original(model):
        return True
    path = model / "vae" / "config.json"
    return validated(Autoencoder, read_json_mapping(path), str(path)).base_dim == Autoencoder.model_fields["base_dim"].default


def cpu_name() -> str:
    """As the kernel calls it, where it does."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def rank_facts(mesh: Mesh) -> dict[str, Any]:
    """Of this rank and the machine it runs on; memory in GB."""
    on_gpu = mesh.device.type == "cuda"
    return {
        "host": host_of_rank(mesh.rank),
        "device": torch.cuda.get_device_name(mesh.device) if on_gpu else mesh.device.type.upper(),
        "device_memory_gb": torch.cuda.get_device_properties(mesh.device).total_memory / GB if on_gpu else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "host_memory_gb": psutil.virtual_memory().total / GB,
        "resident_gb": psutil.Process().memory_info().rss / GB,  # before there is a model
    }


def versions() -> dict[str, str]:
    found = {"dmd_ds": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {}) | {"system": platform.platform()}


def write_start(inputs: Inputs, prompt_tokens: int, mesh: Mesh) -> None:
    """A line of starts.jsonl; every rank calls it, before there is a model."""
    facts = mesh.all_gather_objects(rank_facts(mesh))
    if not mesh.is_first:
        return
    plan = planned_memory(inputs, prompt_tokens, mesh.world_size) if inputs.recipe.stage == "dmd2" else None  # the planner knows no other
    line = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": inputs.first_step,
        "command": [Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))],
        "summary": inputs.summary().splitlines(),
        "split": {"data": mesh.data_size, "ulysses": mesh.ulysses, "ring": mesh.ring},
        "ranks": facts,
        "versions": versions(),
        "planned": plan and {"peak_phase": plan.peak_phase, "always": plan.always, "phases": plan.phases},
    }
    with (Path(inputs.recipe.output_dir) / STARTS).open("a") as file:
        file.write(json.dumps(line) + "\n")

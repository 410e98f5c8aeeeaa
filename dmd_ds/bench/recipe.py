"""A shipped recipe on this machine's accelerators, with random weights of its published size: memory against the plan, and seconds.

The peak is that of what torch has allocated, so what the CUDA context and the allocator's fragments take is beside it (`reserved`).
Operations are those of the algorithm: what activation checkpointing runs again is not counted (model FLOP utilisation).
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, trainer_of, write_data, write_model
from dmd_ds.distill.stage import GENERATOR
from dmd_ds.errors import UserError
from dmd_ds.parallel.engine import read_ds_config
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.cost import Machine, flops
from dmd_ds.planner.memory import memory
from dmd_ds.planner.sizes import Video, published_size, setup_of
from dmd_ds.recipe import load_recipe

# every iteration has the same passes, and nothing is needed but the transformer
CHANGES = ("rollout.exit=last", "validation.every=0", "save_every=1000000")


def world_of(name: str, video: Video) -> World:
    """The recipe's model at that size of video; `UserError` for a recipe that names no published size, or an image's."""
    size = published_size(name)
    if size is None or size.image_dim:
        raise UserError(f"recipe {name}: must be one of text to video that names a published size (1.3b, 14b)")
    frames, height, width = video.latents()
    about_model = {key: getattr(size, key) for key in ("layers", "heads", "head_dim", "ffn", "text_dim", "freq_dim")}
    return World(**about_model, frames=frames, height=height, width=width)


def check_recipe(name: str, overrides: list[str]) -> None:
    """`UserError`, before anything is written, for a recipe with a mistake, of another stage than DMD2, or with a warm-up before it."""
    recipe = load_recipe(name, [*CHANGES, *overrides])  # which no other stage has a use for
    if recipe.regression.steps:
        raise UserError(f"recipe {name}: regression.steps={recipe.regression.steps}: DMD2 is measured, without a warm-up")


def on_rank(name: str, overrides: list[str], world: dict, video: dict, folder: str) -> dict[str, Any]:
    """Seconds and peaks by turn of a second iteration, of which the fake score's turn is taken once."""
    world, accelerator = World(**world), get_accelerator()
    paths = (f"model.path={folder}/model", f"data.path={folder}/data", f"output_dir={folder}/run")
    recipe = load_recipe(name, [*CHANGES, *overrides, *paths])
    with joined(recipe.parallel) as mesh:
        trainer = trainer_of(world, recipe, mesh)
        found: dict[str, Any] = {"turns": {}}
        for step in (0, recipe.fake_score.updates_per_generator_update):  # the generator is due; once to warm up
            batches = trainer.batches(step)
            for turn in trainer.stage.turns(step):
                accelerator.synchronize()
                accelerator.reset_peak_memory_stats()
                began = time.perf_counter()
                turn.take(batches, step)
                if turn.engine == GENERATOR and trainer.ema:
                    trainer.ema.update()
                accelerator.synchronize()
                taken = {"seconds": time.perf_counter() - began, "peak": accelerator.max_memory_allocated()}
                found["turns"][turn.name] = taken | {"reserved": accelerator.max_memory_reserved()}
        found["standing"] = accelerator.memory_allocated()
        trainer.monitor.close()
        sections = {"generator": recipe.generator, "fake_score": recipe.fake_score}
        files = {key: read_ds_config(f"{key}.ds_config", section.ds_config) for key, section in sections.items()}
        setup = setup_of(recipe, world.model, Video(**video), mesh.world_size, files, text_tokens=trainer.prompt_tokens)
        plan, k = memory(setup), recipe.fake_score.updates_per_generator_update
        found["planned"], found["planned_standing"] = {name: plan.step_peak(name) for name in found["turns"]}, plan.standing
        found["seconds"] = found["turns"]["generator"]["seconds"] + k * found["turns"]["fake score"]["seconds"]
        found["flops"] = k * flops(dataclasses.replace(setup, checkpointing=False))
    return found


def measure(name: str, overrides: list[str], video: Video) -> dict[str, Any]:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        raise UserError("recipe: needs an accelerator; on a CPU `memory` and `step` measure the same code at small sizes")
    check_recipe(name, overrides)
    world = world_of(name, video)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_model(Path(folder) / "model", world.model)
        write_data(Path(folder) / "data", world)
        arguments = {"name": name, "overrides": overrides, "world": world.__dict__, "video": dataclasses.asdict(video)}
        found = run_ranks("recipe", accelerator.device_count(), folder=folder, **arguments)
    return found | arguments


def table(found: dict[str, Any]) -> str:
    lines = ["| | seconds | peak, GB | planned, GB | peak / planned | reserved, GB |", "|---" * 6 + "|"]
    for name, turn in found["turns"].items():
        peak, planned = turn["peak"], found["planned"][name]
        cells = (f"{turn['seconds']:.2f}", *(f"{size / 1e9:.2f}" for size in (peak, planned)), f"{peak / planned:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {turn['reserved'] / 1e9:.2f} |")
    standing, planned = found["standing"], found["planned_standing"]
    lines.append(f"| between steps | | {standing / 1e9:.2f} | {planned / 1e9:.2f} | {standing / planned:.3f} | |")
    share = found["flops"] / found["seconds"] / Machine().flops
    return "\n".join(lines) + (
        f"\n\nAn iteration, a generator update and the fake score's of its ratio: {found['seconds']:.1f} s, "
        f"{found['flops'] / 1e15:.1f} PFLOP of the algorithm, {share:.1%} of {Machine().flops / 1e12:.0f} TFLOP/s."
    )

#!/usr/bin/env python3
"""Makes a diffusers folder from a ZeRO-3 checkpoint, of any number of ranks, one tensor at a time.

    python tools/zero_to_safetensors.py CHECKPOINT OUT

CHECKPOINT is a run's folder (its newest checkpoint is taken) or one checkpoints/step_NNNNNN. OUT loads with
diffusers.WanPipeline.from_pretrained, or WanImageToVideoPipeline of an image-to-video model; sample it with as many steps as it
was trained for and guidance_scale=1.0.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from dmd_ds import checkpoint
from dmd_ds.checkpoint import ZeroWeights
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.generation import Settings, write_settings
from dmd_ds.recipe import Recipe, load_recipe
from dmd_ds.sampler import few_step_scheduler, few_step_sigmas
from dmd_ds.wan.weights import find_model, save_weights, takes_image, transformer_config, transformer_files

PREFIX = "transformer."  # WanDenoiser's name for the diffusers model


def find_checkpoint(path: Path) -> Path:
    if (path / checkpoint.STATE).is_file():
        return path
    newest = checkpoint.latest(path)
    if newest is None:
        raise UserError(f"{path}: neither a checkpoint ({checkpoint.STATE} is missing) nor a run with one")
    return newest


def stored_dtype(model: Path) -> torch.dtype:
    """The type in which the base model's weights are stored: the student's are stored alike."""
    name, file = next(iter(transformer_files(model / "transformer").items()))
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).dtype


def pipeline_class(model: Path) -> str:
    return "WanImageToVideoPipeline" if takes_image(transformer_config(model)) else "WanPipeline"


def model_card(recipe: Recipe, model: Path, state: dict) -> str:
    sampling, video = recipe.sampling, state["video"]
    size = f"height={video['height']}, width={video['width']}, num_frames={video['frames']}"
    pipeline = pipeline_class(model)
    takes = {"WanPipeline": "prompt", "WanImageToVideoPipeline": "image, prompt"}[pipeline]
    sigmas = ", ".join(f"{1000 * sigma:.0f}" for sigma in few_step_sigmas(sampling)[:-1])
    return f"""---
library_name: diffusers
pipeline_tag: {"text-to-video" if pipeline == "WanPipeline" else "image-to-video"}
---
# {model.name}, distilled to {sampling.steps} steps

Distilled with DMD2 by dmd_ds from {recipe.model.path}; data {recipe.data.path}; {state["step"]} fake-score updates,
a generator update every {recipe.fake_score.updates_per_generator_update}; the teacher's guidance of {recipe.score.guidance} is built in.

    import torch
    from diffusers import {pipeline}

    pipeline = {pipeline}.from_pretrained(FOLDER)
    video = pipeline({takes}, num_inference_steps={sampling.steps}, guidance_scale=1.0, {size}).frames[0]

The scheduler in this folder gives the timesteps it was trained on, {sigmas}, and noises the sample afresh between them.
The base model's licence holds for this one.
"""


def zero_to_safetensors(source: Path, out: Path, model: str | None = None, max_shard_gb: float = 5.0) -> Path:
    """Writes the folder and returns it; it has its final name only when it is whole."""
    folder = find_checkpoint(source)
    recipe = load_recipe(str(folder / checkpoint.RECIPE))
    base = find_model(model or recipe.model.path)
    if out.exists():
        raise UserError(f"{out}: exists already; name another folder or remove it")
    weights = ZeroWeights(folder / "generator")
    shapes = {name.removeprefix(PREFIX): shape for name, shape in weights.shapes.items()}
    missing = transformer_files(base / "transformer").keys() ^ shapes.keys()
    if missing:
        raise UserError(f"{folder / 'generator'}: its tensors are not those of {base}; {sorted(missing)[0]} is in one of them only")

    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(base, unfinished, ignore=lambda where, names: {"transformer", "scheduler", "README.md"} & set(names))
    (unfinished / "transformer").mkdir()
    config = transformer_config(base)
    (unfinished / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dtype = stored_dtype(base)
    save_weights(unfinished / "transformer", shapes, lambda name: weights.read(PREFIX + name), dtype, int(max_shard_gb * 1e9))

    scheduler = few_step_scheduler(recipe.sampling)
    scheduler.save_pretrained(unfinished / "scheduler")
    index = json.loads((unfinished / "model_index.json").read_text())
    index["_class_name"] = pipeline_class(base)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (unfinished / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    state = checkpoint.read_state(folder)
    write_settings(unfinished, Settings(steps=recipe.sampling.steps, guidance=1.0, few_step=recipe.sampling, **state["video"]))
    (unfinished / "README.md").write_text(model_card(recipe, base, state))
    unfinished.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", help="the base model's folder, where it is not at the recipe's model.path any more")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file in GB (default: %(default)s)")
    a = parser.parse_args()
    with one_line_errors():
        print(zero_to_safetensors(a.checkpoint, a.out, a.model, a.max_shard_gb))


if __name__ == "__main__":
    main()

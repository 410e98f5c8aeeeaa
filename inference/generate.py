#!/usr/bin/env python3
"""Makes videos from a file of prompts.

    python inference/generate.py --model outputs/demo/student --prompts prompts.txt --out videos [--seed N]
    deepspeed --num_gpus 8 inference/generate.py ... --ulysses 8     # the tokens of each video over 8 GPUs

Prompts are lines of a .txt, or of a .jsonl: {"prompt": "...", "seed": 7}. Sample i has the seed N + i unless its line names
one. A second run skips what is finished; manifest.jsonl says which file holds what.
"""

import argparse
import dataclasses
import hashlib
import json
import re
from pathlib import Path

from tqdm import tqdm

from dmd_ds.checkpoint import write_whole
from dmd_ds.data.video import write_video
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.generation import Settings, VideoModel, inference_dtype
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import Mesh, check_degrees, joined
from dmd_ds.recipe import Parallel
from dmd_ds.wan.autoencoder import decode
from dmd_ds.wan.weights import find_model, stored_tensors, transformer_config

GIVEN = {"steps": int, "guidance": float, "frames": int, "height": int, "width": int, "fps": float}  # options that override a model's own


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: str
    seed: int

    def name(self, index: int, settings: Settings, model: str, negative_prompt: str) -> str:
        """A file name that no other prompt, seed, model or setting shares, made of harmless letters."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60]
        key = json.dumps([self.prompt, self.seed, model, settings.model_dump(), negative_prompt])
        return f"{index:05d}-{slug}-{hashlib.sha256(key.encode()).hexdigest()[:10]}.mp4"


def read_jobs(path: Path, seed: int) -> list[Job]:
    """The prompts of a txt or jsonl file; `UserError` names the line."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    try:
        lines = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as text: {error}") from error
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [Job(line, seed + i) for i, (_, line) in enumerate(lines)]
    jobs = []
    for i, (number, line) in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not readable as JSON: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}:{number}: a line reads {{"prompt": "...", "seed": 7}}')
        own_seed = record.get("seed", seed + i)
        if not isinstance(own_seed, int) or isinstance(own_seed, bool):
            raise UserError(f"{path}:{number}: seed={own_seed!r} is not a whole number")
        jobs.append(Job(record["prompt"], own_seed))
    return jobs


def fingerprint(folder: Path) -> str:
    """Tells the weights of one folder from others, at the same path or not, without reading them whole."""
    files = sorted({tensor.file for tensor in stored_tensors(folder / "transformer").values()})
    return json.dumps([str(folder)] + [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def generate(model: VideoModel, jobs: list[Job], out: Path, settings: Settings, batch_size: int, negative_prompt: str, mesh: Mesh) -> int:
    """Makes what is not there yet, on all ranks of the job; returns how many videos were made."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    names = [job.name(index, settings, fingerprint(model.folder), negative_prompt) for index, job in enumerate(jobs)]
    there = mesh.all_gather_objects({name for name in names if (out / name).exists()})[0]  # what one sees, all go by
    todo = [(name, job) for name, job in zip(names, jobs, strict=True) if name not in there]
    starts = range(mesh.data_rank * batch_size, len(todo), mesh.data_size * batch_size)
    for start in tqdm(starts, desc="generating", unit="batch", disable=not mesh.is_first):
        part = todo[start : start + batch_size]
        latents = model.latents([job.prompt for _, job in part], [job.seed for _, job in part], settings, negative_prompt)
        if mesh.leads_sample:
            for (name, _), video in zip(part, decode(model.vae, latents).numpy(), strict=True):
                write_video(out / name, video, settings.fps)
    mesh.barrier()
    if mesh.is_first:
        shared = {"model": str(model.folder), "negative_prompt": negative_prompt, **settings.model_dump()}
        records = {name: {"file": name, "prompt": job.prompt, "seed": job.seed, **shared} for name, job in zip(names, jobs, strict=True)}
        write_manifest(out / "manifest.jsonl", records)
    return len(todo)


def write_manifest(manifest: Path, by_file: dict[str, dict]) -> None:
    """A line a file: those of earlier runs stay."""
    records = [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.is_file() else []
    by_file = {record["file"]: record for record in records} | by_file
    write_whole(manifest, "".join(json.dumps(record) + "\n" for record in by_file.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="diffusers Wan folder, student or teacher, or the name of a shipped one")
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--ulysses", type=int, default=1, help="ranks that share each video by attention heads")
    parser.add_argument("--ring", type=int, default=1, help="times so many that pass keys and values around")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    for name, kind in GIVEN.items():
        parser.add_argument(f"--{name}", type=kind, help="default: what the model's folder says, else Wan2.1's own")
    a = parser.parse_args()
    with one_line_errors():
        for name in ("batch_size", "ulysses", "ring"):
            if getattr(a, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be at least 1")
        jobs = read_jobs(a.prompts, a.seed)
        parallel = Parallel(ulysses=a.ulysses, ring=a.ring)
        check_degrees(parallel, transformer_config(find_model(a.model))["num_attention_heads"])
        with joined(parallel) as mesh:
            model = VideoModel(a.model, mesh.device, SequenceParallel(mesh, inference_dtype(mesh.device)))
            settings = model.settings.changed(**{name: getattr(a, name) for name in GIVEN})
            if settings.few_step and settings.steps != settings.few_step.steps:
                raise UserError(f"--steps {settings.steps}: {a.model} was distilled for {settings.few_step.steps} steps")
            model.latents_shape(settings)
            made = generate(model, jobs, a.out, settings, a.batch_size, a.negative_prompt, mesh)
    if mesh.is_first:
        print(f"{a.out}: {made} videos made, {len(jobs) - made} were there")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes videos from a prompt or a file of prompts, and of images where the model takes them.

    python inference/generate.py --model outputs/demo/student --prompt "a red circle moving sideways" --out videos
    python inference/generate.py --model outputs/demo/student --prompts prompts.txt --out videos [--seed N]
    python inference/generate.py --model STUDENT --prompts prompts.txt --image first_frame.png --out videos
    python inference/generate.py --model outputs/tiny_reward --lora-scale 0.5 ...    # a checkpoint, with half of its adapter
    deepspeed --num_gpus 8 inference/generate.py ... --ulysses 8     # the tokens of each video over 8 GPUs

Prompts are lines of a .txt, or of a .jsonl: {"prompt": "...", "image": "a.png", "seed": 7}. Sample i has the seed N + i and
the image of --image unless its line names one; images are relative to the .jsonl, scaled and cropped. A second run skips what
is finished; manifest.jsonl says which file holds what, contact_sheet.png shows the first of them.
"""

import argparse
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import imageio.v3 as iio
from tqdm import tqdm

from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.data.video import contact_sheet, read_image, read_video, write_video
from dmd_ds.errors import UserError, one_line_errors, read_jsonl, read_text
from dmd_ds.generation import Settings, VideoModel, inference_dtype
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import Mesh, check_degrees, joined
from dmd_ds.recipe import Parallel
from dmd_ds.source import find_source
from dmd_ds.wan.autoencoder import decode
from dmd_ds.wan.weights import takes_image, transformer_config

GIVEN = {"steps": int, "guidance": float, "frames": int, "height": int, "width": int, "fps": float}  # options that override a model's own
ON_THE_SHEET = 16  # videos of a contact sheet
SHEET_WIDTH = 256  # pixels of a frame there, about


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: str
    seed: int
    image: Path | None = None

    def name(self, index: int, settings: Settings, model: str, negative_prompt: str) -> str:
        """A file name that no other prompt, seed, image, model or setting shares, made of harmless letters."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60]
        shown = [] if self.image is None else [hashlib.sha256(self.image.read_bytes()).hexdigest()]
        key = json.dumps([self.prompt, self.seed, model, settings.model_dump(), negative_prompt, *shown])
        return f"{index:05d}-{slug}-{hashlib.sha256(key.encode()).hexdigest()[:10]}.mp4"

    def record(self) -> dict:
        """What the manifest says of it."""
        return {"prompt": self.prompt, "seed": self.seed} | ({} if self.image is None else {"image": str(self.image)})


def read_jobs(path: Path, seed: int, image: Path | None = None) -> list[Job]:
    """The prompts of a txt or jsonl file; `UserError` names the line."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    if path.suffix != ".jsonl":
        jobs = [Job(line, seed + i, image) for i, line in enumerate(filter(None, map(str.strip, read_text(path).splitlines())))]
    else:
        jobs = read_records(path, seed, image)
    if not jobs:
        raise UserError(f"{path}: holds no prompt")
    return jobs


def read_records(path: Path, seed: int, image: Path | None) -> list[Job]:
    jobs = []
    for i, (number, record) in enumerate(read_jsonl(path)):
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}:{number}: a line reads {{"prompt": "...", "image": "a.png", "seed": 7}}, the last two if wanted')
        own_seed = record.get("seed", seed + i)
        if not isinstance(own_seed, int) or isinstance(own_seed, bool):
            raise UserError(f"{path}:{number}: seed={own_seed!r} is not a whole number")
        own_image = record.get("image")
        if not (own_image is None or isinstance(own_image, str)):
            raise UserError(f"{path}:{number}: image={own_image!r} is not a file's name")
        jobs.append(Job(record["prompt"], own_seed, image if own_image is None else path.parent / own_image))
    return jobs


def check_images(jobs: list[Job], model: str, config: dict, settings: Settings) -> None:
    """A readable image for each job of a model that takes them, and for none of another."""
    for number, job in enumerate(jobs, 1):
        if job.image is None and takes_image(config):
            raise UserError(f'prompt {number}: --model {model} needs an image; give --image FILE, or "image" in its line')
        if job.image is not None and not takes_image(config):
            raise UserError(f"{job.image}: --model {model} makes videos from text and takes no image")
    for image in {job.image for job in jobs if job.image is not None}:
        read_image(image, settings.height, settings.width)


def generate(
    model: VideoModel, mark: str, jobs: list[Job], out: Path, settings: Settings, batch_size: int, negative_prompt: str, mesh: Mesh
) -> int:
    """Makes what is not there yet, on all ranks of the job; returns how many videos were made. `mark`: of the model's weights."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    names = [job.name(index, settings, mark, negative_prompt) for index, job in enumerate(jobs)]
    there = mesh.all_gather_objects({name for name in names if (out / name).exists()})[0]  # what one sees, all go by
    todo = [(name, job) for name, job in zip(names, jobs, strict=True) if name not in there]
    starts = range(mesh.data_rank * batch_size, len(todo), mesh.data_size * batch_size)
    for start in tqdm(starts, desc="generating", unit="batch", disable=not mesh.is_first):
        part = todo[start : start + batch_size]
        pictures = [read_image(job.image, settings.height, settings.width) for _, job in part if job.image is not None]
        shown = model.condition(pictures, settings) if pictures else None
        latents = model.latents([job.prompt for _, job in part], [job.seed for _, job in part], settings, negative_prompt, shown)
        if mesh.leads_sample:
            for (name, _), video in zip(part, decode(model.vae, latents).numpy(), strict=True):
                write_video(out / name, video, settings.fps)
    mesh.barrier()
    if mesh.is_first:
        shared = {"model": str(model.folder), "negative_prompt": negative_prompt, **settings.model_dump()}
        records = {name: {"file": name, **job.record(), **shared} for name, job in zip(names, jobs, strict=True)}
        write_manifest(out / "manifest.jsonl", records)
        write_contact_sheet(out / "contact_sheet.png", [out / name for name in names[:ON_THE_SHEET]], settings)
    return len(todo)


def write_contact_sheet(sheet: Path, files: list[Path], settings: Settings) -> None:
    """Frames of the videos, a line each, small."""
    every = max(1, round(settings.width / SHEET_WIDTH))
    videos = [read_video(file, settings.frames, settings.height, settings.width, settings.fps)[:, ::every, ::every] for file in files]
    iio.imwrite(sheet, contact_sheet([[video] for video in videos]))


def write_manifest(manifest: Path, by_file: dict[str, dict]) -> None:
    """A line a file: those of earlier runs stay."""
    earlier = read_jsonl(manifest) if manifest.is_file() else []
    for number, record in earlier:
        if not isinstance(record, dict) or not isinstance(record.get("file"), str):
            raise UserError(f"{manifest}:{number}: no record of a video; move the file away")
    by_file = {record["file"]: record for _, record in earlier} | by_file
    write_whole(manifest, "".join(json.dumps(record) + "\n" for record in by_file.values()))


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, help="diffusers Wan folder, the name of a shipped one, a run or a checkpoint")
    parser.add_argument("--lora-scale", type=float, metavar="S", help="of a checkpoint's adapter, where it was trained as LoRA")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument("--prompts", metavar="FILE", type=Path, help="a .txt or .jsonl of prompts")
    parser.add_argument("--image", type=Path, help="the first frame, for an image-to-video model")
    parser.add_argument("--out", required=True, type=Path, help="the folder for the videos")
    parser.add_argument("--seed", type=int, default=0, help="of the first video; the next has the next (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="videos a rank makes at once (default: %(default)s)")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: nothing)")
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
        jobs = [Job(a.prompt, a.seed, a.image)] if a.prompts is None else read_jobs(a.prompts, a.seed, a.image)
        parallel = Parallel(ulysses=a.ulysses, ring=a.ring)
        source = find_source(a.model, lora_scale=a.lora_scale)
        config = transformer_config(source.folder)
        check_degrees(parallel, config["num_attention_heads"])
        settings = source.settings.changed(**{name: getattr(a, name) for name in GIVEN})
        check_images(jobs, a.model, config, settings)
        with joined(parallel) as mesh:
            model = source.load(mesh.device, SequenceParallel(mesh, inference_dtype(mesh.device)))
            model.latents_shape(settings)
            made = generate(model, source.mark, jobs, a.out, settings, a.batch_size, a.negative_prompt, mesh)
    if mesh.is_first:
        print(f"{a.out}: {made} videos made, {len(jobs) - made} were there")


if __name__ == "__main__":
    main()

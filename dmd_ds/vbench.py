"""The videos that VBench judges, under the names it looks for: `{prompt}-{index}.mp4`, five to a prompt, in one flat folder.

    OUT/videos/            the mp4 files and nothing else: VBench takes the file ending from the folder's first entry
    OUT/prompts.json       the prompt of each file, for VBench's --mode=custom_input --prompt_file
    OUT/made_with.json     the model and its settings
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from tqdm import tqdm

from dmd_ds.checkpoint import write_whole
from dmd_ds.data.video import write_video
from dmd_ds.errors import UserError, read_json, read_text
from dmd_ds.generation import Settings, VideoModel
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.wan.autoencoder import decode

LONGEST = 200  # bytes of a prompt in a file's name: the name gets up to 255 with index, ending and what marks it as unfinished
ENDINGS = len(".-00000.tmp.mp4")


@dataclasses.dataclass(frozen=True)
class Wanted:
    prompt: str
    seed: int
    file: str


def read_prompts(path: Path) -> list[str]:
    """VBench's list, a prompt a line; those that come twice once."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def file_stem(prompt: str) -> str:
    """The prompt itself, which is what VBench looks for, unless no file should be called so: then what can be of it, and a hash.

    That is for slashes and what no printer prints, dots in front, which hide a file, names that are too long, and those that look
    as if they had a hash already. Such files VBench's standard mode does not find; prompts.json names their prompts.
    """
    harmless = "".join(c if c.isprintable() and c != "/" else "_" for c in re.sub(r"^\.+", "_", prompt))
    if harmless == prompt and len(prompt.encode()) <= 255 - ENDINGS and not re.search(r"~[0-9a-f]{8}$", prompt):
        return prompt
    short = harmless.encode()[:LONGEST].decode(errors="ignore")
    return f"{short}~{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def wanted(prompts: list[str], samples: int, first_seed: int) -> list[Wanted]:
    """Every video has a seed of its own."""
    return [
        Wanted(prompt, first_seed + place * samples + index, f"{file_stem(prompt)}-{index}.mp4")
        for place, prompt in enumerate(prompts)
        for index in range(samples)
    ]


def check_made_with(out: Path, made_with: dict) -> None:
    """`UserError` for a folder that holds videos of another model or other settings."""
    file = out / "made_with.json"
    if file.is_file() and read_json(file) != made_with:
        raise UserError(f"--out {out}: holds videos made with other settings, see {file.name}; name another folder")


def write_videos(
    model: VideoModel, videos: list[Wanted], out: Path, settings: Settings, batch_size: int, made_with: dict, mesh: Mesh
) -> int:
    """Makes what is not there yet, on all ranks of the job; returns how many videos were made."""
    check_made_with(out, made_with)
    mesh.barrier()
    folder = out / "videos"
    if mesh.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp.mp4"):  # of a run that was stopped
            left.unlink()
        write_whole(out / "made_with.json", json.dumps(made_with, indent=1) + "\n")
        write_whole(out / "prompts.json", json.dumps({str(folder / one.file): one.prompt for one in videos}, indent=1) + "\n")
    mesh.barrier()
    there = mesh.all_gather_objects({one.file for one in videos if (folder / one.file).exists()})[0]  # what one sees, all go by
    todo = [one for one in videos if one.file not in there]
    starts = range(mesh.data_rank * batch_size, len(todo), mesh.data_size * batch_size)
    for start in tqdm(starts, desc="VBench", unit="batch", disable=not mesh.is_first):
        part = todo[start : start + batch_size]
        latents = model.latents([one.prompt for one in part], [one.seed for one in part], settings)
        if mesh.leads_sample:
            for one, video in zip(part, decode(model.vae, latents).numpy(), strict=True):
                write_video(folder / one.file, video, settings.fps)
    mesh.barrier()
    return len(todo)

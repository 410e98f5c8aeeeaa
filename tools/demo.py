#!/usr/bin/env python3
"""The whole job on the embedded world, from video files to a 4-step student: what `make demo` runs.

    clips as mp4 -> latents -> DMD2 on two ranks -> diffusers folder -> teacher, undistilled and student side by side

    python tools/demo.py --out outputs/longer max_steps=1000

Leaves outputs/demo/ with student/ (a diffusers folder), samples/ (mp4 files and contact_sheet.png), demo.webp (the same in one
animation), report.json and report.html, which a browser opens. What is finished is not done again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import torch

from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.data import moving_shapes
from dmd_ds.data.clips import write_clips
from dmd_ds.data.video import contact_sheet, write_animation, write_video
from dmd_ds.errors import UserError, one_line_errors, read_json
from dmd_ds.evaluation import REFERENCE, Evaluation, caption_list, evaluate, table
from dmd_ds.generation import Settings, VideoModel
from dmd_ds.recipe import REPOSITORY, load_recipe
from dmd_ds.report.page import write_page

TEACHER = "tiny-wan"
FIRST_SEED = 10_000  # of the videos that are judged; the kept reference has others
SHOWN = 8  # prompts on the contact sheet
SECONDS_BETWEEN_LINES = 30


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: str, log: Path) -> None:
    """Runs a command of this project, showing now and then the last line it printed; where it fails, the last thirty."""
    print("$", " ".join(command), f"  (log: {log})", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                process.wait(timeout=SECONDS_BETWEEN_LINES)
            except subprocess.TimeoutExpired:
                print("  ", *re.split(r"[\r\n]+", log.read_text().strip())[-1:], flush=True)
    if process.returncode:
        print("\n".join(log.read_text().splitlines()[-30:]), file=sys.stderr)
        raise UserError(f"{command[0]} ended with code {process.returncode}; the whole of what it printed is in {log}")


def encode(clips: Path, data: Path, log: Path) -> None:
    size = ["--sizes", f"{moving_shapes.FRAMES}x{moving_shapes.HEIGHT}x{moving_shapes.WIDTH}"]
    command = [sys.executable, "tools/encode_videos.py", str(clips / "clips.jsonl"), str(data), "--model", TEACHER]
    run(*command, *size, "--fps", str(moving_shapes.FPS), log=log)


def train(out: Path, data: Path, overrides: list[str], log: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", os.environ.get("MASTER_PORT", "29500")]
    if torch.cuda.device_count() == 1:  # one rank does the work of two
        launcher += ["--num_gpus", "1"]
        overrides = [f"data.batch_size={2 * load_recipe('tiny', overrides).data.batch_size}", *overrides]
    else:
        launcher += ["--hostfile", "hostfiles/local", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    run(*launcher, "dmd_ds/train.py", "tiny", f"output_dir={out / 'run'}", f"data.path={data}", *overrides, log=log)


def compare(student: Path, prompt_count: int) -> dict[str, Evaluation]:
    """Teacher as published, at 50 guided steps, undistilled and student at a few, on the same prompts and seeds.

    Undistilled is the student before its first step, sampled as the student is, without guidance. With guidance, at twice the
    evaluations, it is the harder baseline; the report has it too.
    """
    prompts, reference_NF = caption_list(prompt_count), moving_shapes.read_features(REFERENCE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, distilled = VideoModel(TEACHER, device), VideoModel(str(student), device)
    few_step = distilled.settings.few_step
    guided_settings = teacher.settings.model_copy(update={"steps": few_step.steps, "few_step": few_step})
    rows: dict[str, tuple[VideoModel, Settings]] = {
        "teacher": (teacher, teacher.settings),
        "undistilled": (teacher, guided_settings.model_copy(update={"guidance": 1.0})),
        "undistilled_guided": (teacher, guided_settings),
        "student": (distilled, distilled.settings),
    }
    evaluations = {}
    for name, (model, settings) in rows.items():
        print(f"sampling {prompt_count} videos: {name}", flush=True)
        evaluations[name] = evaluate(model, prompts, FIRST_SEED, settings, reference_NF)
    return evaluations


def shown_places(videos: int) -> list[int]:
    """Of the videos that are shown: of other captions each."""
    return [i * min(videos, len(moving_shapes.CAPTIONS)) // SHOWN for i in range(SHOWN)]


def write_samples(folder: Path, evaluations: dict[str, Evaluation]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shown = {name: evaluations[name] for name in ("teacher", "undistilled", "student")}
    videos = len(shown["student"].videos)
    places = shown_places(videos)
    for name, evaluation in shown.items():
        for place in places:
            path = folder / f"{place:03d} {moving_shapes.CAPTIONS[place]}, {name}.mp4".replace(" ", "_").replace(",", "")
            write_video(path, evaluation.videos[place], moving_shapes.FPS)
    sheet = contact_sheet([[evaluation.videos[place] for evaluation in shown.values()] for place in places])
    iio.imwrite(folder / "contact_sheet.png", sheet)


def write_film(path: Path, evaluations: dict[str, Evaluation], steps: int) -> None:
    """The same prompts and seeds by teacher, undistilled model and student, in motion."""
    shown = {"teacher": "teacher, 50 steps", "undistilled": f"undistilled, {steps} steps", "student": f"student, {steps} steps"}
    places = shown_places(len(evaluations["student"].videos))
    rows = {str(moving_shapes.CAPTIONS[place]): [evaluations[name].videos[place] for name in shown] for place in places}
    write_animation(path, list(shown.values()), rows, moving_shapes.FPS)


def write_report(path: Path, evaluations: dict[str, Evaluation], prompt_count: int) -> None:
    """report.json: a row a model, and how much of the gap to the teacher the student closes."""
    rows = {name: evaluation.numbers for name, evaluation in evaluations.items()}
    teacher, undistilled, student = rows["teacher"], rows["undistilled"], rows["student"]
    floor = teacher["frechet"]  # these seeds are a second set of the guided teacher's videos; the reference is the first
    report = {
        "prompts": prompt_count,
        **rows,
        "floor": floor,
        "gap_closed": (undistilled["frechet"] - student["frechet"]) / (undistilled["frechet"] - floor),
        "both_of_teacher": student["both"] / teacher["both"],
        "speedup": teacher["seconds"] / student["seconds"],
    }
    write_whole(path, json.dumps(report, indent=1) + "\n")


def check_settings(path: Path, settings: dict) -> None:
    """What is in the folder must come from the same settings: nothing of another run is shown as this one's."""
    if path.is_file():
        if read_json(path) != settings:
            raise UserError(f"{path}: that folder holds a demo with other settings; name another with --out or remove it")
    elif any(path.parent.iterdir()):
        raise UserError(f"--out {path.parent}: holds other things; name another folder")
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def demo(out: Path, prompt_count: int, clips_a_caption: int, overrides: list[str]) -> None:
    recipe = load_recipe("tiny", overrides)
    if prompt_count < SHOWN:
        raise UserError(f"--prompts {prompt_count}: at least {SHOWN}")
    out = out.resolve()  # the commands run from the project's folder
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "settings.json", {"prompts": prompt_count, "clips": clips_a_caption, "recipe": recipe.model_dump(mode="json")})
    clips, data, student, report_file = out / "clips", out / "data", out / "student", out / "report.json"
    began = time.monotonic()

    say("1/5 clips of moving shapes, as mp4")
    if not clips.exists():
        write_clips(clips, clips_a_caption * len(moving_shapes.CAPTIONS))
    say("2/5 their latents and text embeddings")
    if not data.exists():
        encode(clips, data, out / "encode.log")
    say("3/5 DMD2: generator and fake score, two ZeRO-3 engines on two ranks")
    if not student.exists():
        train(out, data, overrides, out / "train.log")
        say("4/5 the student as a diffusers folder")
        run(sys.executable, "tools/zero_to_safetensors.py", str(out / "run"), str(student), log=out / "export.log")
    say("5/5 teacher, undistilled and student on the same prompts and seeds")
    if not report_file.exists():
        evaluations = compare(student, prompt_count)
        write_samples(out / "samples", evaluations)
        write_film(out / "demo.webp", evaluations, recipe.sampling.steps)
        write_report(report_file, evaluations, prompt_count)

    write_page([out / "run"], out / "report.html", title=out.name)
    report = json.loads(report_file.read_text())
    steps = recipe.sampling.steps
    titles = {
        "teacher": "teacher, 50 steps",
        "undistilled": f"undistilled, {steps} steps",
        "undistilled_guided": f"undistilled, {steps} steps, guided",
        "student": f"student, {steps} steps",
    }
    print("\n" + table({title: report[row] for row, title in titles.items()}))
    print(
        f"\nthe student closes {report['gap_closed']:.0%} of the Fréchet gap between the undistilled model and the teacher "
        f"(floor {report['floor']:.2f}) and is {report['speedup']:.0f} times faster; {time.monotonic() - began:.0f} s in all"
    )
    made = (out / "demo.webp", f"{out}/samples/contact_sheet.png", f"{out}/samples/*.mp4", report_file, f"{student}/", out / "report.html")
    print("look at", *made, sep="\n  ")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="the folder that is made (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2 * len(moving_shapes.CAPTIONS), help="judged videos a model (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=2, help="clips a caption (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe `tiny`")
    a = parser.parse_args()
    with one_line_errors():
        demo(a.out, a.prompts, a.clips, a.overrides)


if __name__ == "__main__":
    main()

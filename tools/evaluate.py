#!/usr/bin/env python3
"""Measures what models make: students, and their teacher beside them, at several numbers of steps.

    python tools/evaluate.py STUDENT [STUDENT ...] --teacher tiny-wan --out evaluation     # moving shapes
    python tools/evaluate.py STUDENT --vbench all_dimension.txt --out vbench_videos        # real models

A STUDENT is a pipeline's folder or name, a run, one of its checkpoints or checkpoints/best: ZeRO-3 files are read as they are,
the average of the weights where there is one. Of moving shapes --out gets report.json, table.txt, curves.png and
contact_sheet.png: the judge's shares, the Fréchet distance to the guided teacher's videos, diversity, seconds and model
evaluations a video. What was measured is kept in --out/cache, so a second student costs no teacher.

With --vbench --out gets the videos that VBench looks for, under its names; a second run makes what is missing. On several GPUs:
deepspeed --num_gpus 8 tools/evaluate.py ... --ulysses 4
"""

import argparse
import json
from pathlib import Path

import imageio.v3 as iio
import torch

from dmd_ds.charts import draw_curves
from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.data import moving_shapes
from dmd_ds.data.video import contact_sheet
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.evaluation import COLUMNS, COMPARED, OTHER_SEEDS, REFERENCE, Evaluator, caption_list, compare, lines_of, panels, table
from dmd_ds.generation import inference_dtype
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import check_degrees, joined
from dmd_ds.recipe import Parallel
from dmd_ds.rewards import find_reward
from dmd_ds.source import Source, find_source
from dmd_ds.vbench import check_made_with, read_prompts, wanted, write_videos
from dmd_ds.wan.guidance import has_guidance_embedding
from dmd_ds.wan.weights import transformer_config, transformer_tensors

SIZE = ("frames", "height", "width")


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("models", metavar="STUDENT", nargs="+", help="a pipeline, a run or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is found")
    parser.add_argument("--teacher", help="folder or name of the model they come from")
    parser.add_argument("--teacher-guidance", type=float, metavar="W", help="default: what its folder says, else Wan2.1's own")
    parser.add_argument("--guidance", type=float, metavar="W", help="that guidance-embedded students are told; default: as trained")
    parser.add_argument("--lora-scale", type=float, metavar="S", help="of the adapters of checkpoints that were trained as LoRA")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="default: each student's own")
    parser.add_argument("--weights", choices=["ema", "trained"], help="of checkpoints (default: ema where there is one)")
    parser.add_argument("--prompts", type=int, default=256, metavar="N", help="videos a row, over all captions (default: %(default)s)")
    parser.add_argument("--held-back", action="store_true", help="over the captions that tiny-wan was never shown, instead of all")
    parser.add_argument("--rewards", nargs="+", default=[], metavar="NAME", help="also the means of these, as a recipe names them")
    parser.add_argument("--seed", type=int, default=1000, help="of the first video; the next has the next (default: %(default)s)")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="features of the guided teacher's videos (default: tiny-wan's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="videos made at once (default: 27, with --vbench 1)")
    for name in SIZE:
        parser.add_argument(f"--{name}", type=int, help="default: as the first student was trained")
    parser.add_argument("--vbench", type=Path, metavar="PROMPTS.txt", help="write the videos of these prompts for VBench instead")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="with --vbench, a prompt (VBench wants 5; 25 for flicker)")
    parser.add_argument("--ulysses", type=int, default=1, help="with --vbench, ranks that share each video by attention heads")
    parser.add_argument("--ring", type=int, default=1, help="with --vbench, times so many that pass keys and values around")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    a = parser.parse_args()
    if a.batch_size is None:
        a.batch_size = 1 if a.vbench else 27
    return a


def check(a: argparse.Namespace) -> None:
    for name in ("samples", "batch_size", "ulysses", "ring"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be at least 1")
    if a.prompts < 2:
        raise UserError(f"--prompts {a.prompts}: a Fréchet distance takes at least 2")
    if not a.reference.is_file():
        raise UserError(f"--reference {a.reference}: no such file")
    if len(set(a.models)) < len(a.models):
        raise UserError(f"{' '.join(a.models)}: name each student once")
    if a.steps and (min(a.steps) < 1 or len(set(a.steps)) < len(a.steps)):
        raise UserError(f"--steps {' '.join(map(str, a.steps))}: numbers of at least 1, each once")
    if a.vbench and (len(a.models) > 1 or a.teacher or (a.steps and len(a.steps) > 1)):
        raise UserError("--vbench: one model and one number of steps a folder, without --teacher")
    if a.out.exists() and not a.out.is_dir():
        raise UserError(f"--out {a.out}: is a file, not a folder")


def takes_guidance(source: Source) -> bool:
    """Whether a guidance is told to the model itself."""
    return source.student.takes_guidance if source.student else has_guidance_embedding(transformer_tensors(source.folder))


def measure_shapes(a: argparse.Namespace, sources: list[Source]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captions = moving_shapes.HELD_BACK if a.held_back else moving_shapes.CAPTIONS
    rewards = {name: find_reward(name) for name in a.rewards}
    evaluator = Evaluator(caption_list(a.prompts, captions), a.seed, a.out / "cache", device, a.batch_size, rewards)
    own = sources[0].settings
    size = {name: getattr(a, name) or getattr(own, name) for name in SIZE}
    students = [(source, source.settings.changed(guidance=a.guidance, **size)) for source in sources]
    teacher = None
    if a.teacher:
        source = find_source(a.teacher)
        teacher = source, source.settings.changed(guidance=a.teacher_guidance, **size)
    rows = compare(evaluator, students, teacher, a.steps or [own.steps])

    if size == {"frames": moving_shapes.FRAMES, "height": moving_shapes.HEIGHT, "width": moving_shapes.WIDTH}:
        reference_NF, reference = moving_shapes.read_features(a.reference), str(a.reference)
    elif teacher:  # the kept set is of another size
        reference_NF, reference = evaluator(*teacher, seeds_from=OTHER_SEEDS).features_NF, "the teacher's videos of other seeds"
    else:
        reference_NF, reference = None, None
    lines = lines_of(rows, reference_NF)

    text = table(lines, (*COLUMNS, *(COMPARED if teacher else ()), *rewards))
    write_whole(a.out / "table.txt", text + "\n")
    report = {"prompts": a.prompts, "seed": a.seed, **size, "reference": reference}
    report["rows"] = [{"kind": row.kind, "model": row.model, "steps": row.steps, **lines[row.title]} for row in rows]
    write_whole(a.out / "report.json", json.dumps(report, indent=1) + "\n")
    draw_curves(panels(rows, lines)).save(a.out / "curves.png")
    sheet = contact_sheet([list(videos) for videos in zip(*(row.evaluation.videos for row in rows), strict=True)])
    iio.imwrite(a.out / "contact_sheet.png", sheet)
    print(text)
    print(f"look at {a.out}/curves.png, contact_sheet.png (a column a row of the table), report.json")


def write_for_vbench(a: argparse.Namespace, source: Source) -> None:
    prompts = read_prompts(a.vbench)
    settings = source.settings.changed(steps=a.steps and a.steps[0], guidance=a.guidance, **{name: getattr(a, name) for name in SIZE})
    made_with = {"model": source.mark, "seed": a.seed, "samples": a.samples, **settings.model_dump(mode="json")}
    check_made_with(a.out, made_with)
    parallel = Parallel(ulysses=a.ulysses, ring=a.ring)
    check_degrees(parallel, transformer_config(source.folder)["num_attention_heads"])
    with joined(parallel) as mesh:
        model = source.load(mesh.device, SequenceParallel(mesh, inference_dtype(mesh.device)))
        model.latents_shape(settings)
        videos = wanted(prompts, a.samples, a.seed)
        made = write_videos(model, videos, a.out, settings, a.batch_size, made_with, mesh)
    if mesh.is_first:
        print(f"{a.out}/videos: {made} videos made, {len(videos) - made} were there")


def main() -> None:
    a = parse()
    with one_line_errors():
        check(a)
        sources = [find_source(name, a.weights, a.lora_scale) for name in a.models]
        for source in sources if a.guidance is not None else ():
            if not takes_guidance(source):
                raise UserError(f"--guidance {a.guidance}: {source.name} has no guidance embedding, it cannot be told")
        if a.vbench:
            write_for_vbench(a, sources[0])
        else:
            measure_shapes(a, sources)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes a diffusers folder from a ZeRO-3 checkpoint, of any number of ranks, one tensor at a time.

    python tools/zero_to_safetensors.py CHECKPOINT OUT

CHECKPOINT is a run's folder (its newest checkpoint is taken) or one checkpoints/step_NNNNNN. OUT loads with
diffusers.WanPipeline.from_pretrained, or WanImageToVideoPipeline of an image-to-video model; sample it with as many steps as it
was trained for and guidance_scale=1.0. For other formats see tools/export.py.
"""

from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.errors import one_line_errors
from dmd_ds.export import find_student, sampling_note, to_diffusers


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that is made")
    parser.add_argument("--model", help="the base model's folder, where it is not at the recipe's model.path any more")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file in GB (default: %(default)s)")
    parser.add_argument("--weights", choices=["ema", "trained"], help="the average or the trained ones (default: ema where there is one)")
    a = parser.parse_args()
    with one_line_errors():
        student = find_student(a.checkpoint, a.model, a.weights)
        to_diffusers(student, a.out, int(a.max_shard_gb * 1e9))
        if note := sampling_note(student.recipe.sampling):
            print(note)
        print(a.out)


if __name__ == "__main__":
    main()

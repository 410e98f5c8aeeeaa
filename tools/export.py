#!/usr/bin/env python3
"""Writes a trained generator in a format that others load.

    python tools/export.py CHECKPOINT OUT --format diffusers|wan|comfyui|lora [--rank 64] [--fold-guidance 5]

diffusers: a whole pipeline. wan: config.json and weights under the original names. comfyui: one file for
models/diffusion_models. lora, for load_lora_weights and ComfyUI: the adapter where the generator was trained as one, which the
others hold merged in, else the difference to the base at --rank; prints what that leaves.
A guidance embedding is kept by wan, and by diffusers where the stage was cfg_distill: such a folder is what DMD2 starts from. Else
it is folded, at the guidance it was trained at or at --fold-guidance. --lora-scale takes more or less of an adapter than was trained.
"""

from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.export import find_student, sampling_note, to_comfyui, to_diffusers, to_wan
from dmd_ds.lora import to_lora, to_own_lora

FORMATS = {"diffusers": to_diffusers, "wan": to_wan, "comfyui": to_comfyui}


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that is made")
    parser.add_argument("--format", choices=[*FORMATS, "lora"], default="diffusers", help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, help="of the LoRA of a generator that was trained whole (default: 64)")
    parser.add_argument("--fold-guidance", type=float, metavar="W", help="the guidance that a guidance-embedded student is fixed to")
    parser.add_argument("--lora-scale", type=float, metavar="S", help="of the adapter of one that was trained as LoRA; 1 is as trained")
    parser.add_argument("--model", help="the base model's folder, where it is not at the recipe's model.path any more")
    parser.add_argument("--weights", choices=["ema", "trained"], help="the average or the trained ones (default: ema where there is one)")
    a = parser.parse_args()
    with one_line_errors():
        if a.rank is not None and a.rank < 1:
            raise UserError(f"--rank {a.rank}: must be at least 1")
        student = find_student(a.checkpoint, a.model, a.weights)
        if a.lora_scale is not None:
            student = student.scaled(a.lora_scale)
        own_rank = student.recipe.generator.lora_rank
        if a.rank is not None and own_rank is not None:
            raise UserError(f"--rank {a.rank}: {a.checkpoint} was trained as LoRA of rank {own_rank}; leave --rank out")
        if a.fold_guidance is not None:
            if not student.takes_guidance:
                raise UserError(f"{a.checkpoint}: has no guidance embedding to fold; leave --fold-guidance out")
            student = student.folded(a.fold_guidance)
        if a.format == "lora" and own_rank is not None:
            to_own_lora(student, a.out)
        elif a.format == "lora":
            error = to_lora(student, a.out, a.rank or 64)
            print(f"left over: {error.matrices:.2%} of the change in the matrices, {error.rest:.2%} of all change is in other weights")
        else:
            FORMATS[a.format](student, a.out)
        if a.format == "diffusers" and (note := sampling_note(student.recipe.sampling)):
            print(note)
        print(a.out)


if __name__ == "__main__":
    main()

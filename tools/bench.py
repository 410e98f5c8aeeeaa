#!/usr/bin/env python3
"""Measures what this project costs, as ratios that hold on any machine.

    python tools/bench.py step               # seconds of an iteration, against the same passes in plain PyTorch
    python tools/bench.py gather             # bytes gathered and reduced, against the least
    python tools/bench.py memory             # bytes held and added, against theory
    python tools/bench.py scale              # growth with tokens, ranks, parameters
    python tools/bench.py infer              # 4 steps against the teacher's 50
    python tools/bench.py data               # encoding, loading, waiting
    python tools/bench.py sequence           # one sample over several ranks: bytes kept and sent
    python tools/bench.py load --model 1.3b  # memory while published sizes load
    python tools/bench.py all                # these
    python tools/bench.py recipe t2v_1.3b_480p [key=value]   # on accelerators: a shipped recipe's memory against its plan, seconds

Each part prints a table and writes OUT/PART.json. The world's size can be given, larger for accelerators, where compute has to
dominate for a ratio of seconds to say something: --layers 8 --heads 12 --head-dim 128 --frames 21 --height 60 --width 104. Frames,
height and width are those of latents; of `recipe`, those of a video.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dmd_ds.bench import data, gather, infer, load, memory, recipe, scale, sequence, step
from dmd_ds.bench.world import World
from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.planner.sizes import PUBLISHED, Video

SMALL = World(layers=3, heads=2, head_dim=32, height=4, width=4, frames=2)  # where bytes are counted and seconds are not
PARTS = {
    "step": (step, lambda a: step.measure(world_of(a, World(layers=2, heads=8, height=32, width=32)), a.repeats)),
    "gather": (gather, lambda a: gather.measure(world_of(a, SMALL), a.ranks, iterations=4)),
    "memory": (memory, lambda a: memory.measure()),
    "scale": (scale, lambda a: scale.measure(world_of(a, World(layers=2, frames=2)))),
    "infer": (infer, lambda a: infer.measure(world_of(a, World()), a.repeats)),
    "data": (data, lambda a: data.measure(world_of(a, World()))),
    "sequence": (sequence, lambda a: sequence.measure(a.tokens)),
    "load": (load, lambda a: load.measure(a.model, a.ranks)),
}
ON_ACCELERATORS = {"recipe": (recipe, lambda a: recipe.measure(*named(a), video_of(a)))}
SIZES = ("layers", "heads", "head_dim", "frames", "height", "width")


def world_of(a: argparse.Namespace, default: World) -> World:
    """The part's own world but for what is given; `UserError` for a size that cannot be."""
    given = {name: getattr(a, name) for name in SIZES if getattr(a, name) is not None}
    for name, value in given.items():
        if value < 1 or (name in ("height", "width", "head_dim") and value % 2):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1, and even for height, width and head-dim")
    return World(**{**default.__dict__, **given})


def video_of(a: argparse.Namespace) -> Video:
    return Video(**{name: getattr(a, name) for name in ("frames", "height", "width") if getattr(a, name) is not None})


def named(a: argparse.Namespace) -> tuple[str, list[str]]:
    if not a.recipe:
        raise UserError("recipe: which one? bench.py recipe t2v_1.3b_480p")
    return a.recipe[0], a.recipe[1:]


def run(name: str, a: argparse.Namespace) -> None:
    part, measure = {**PARTS, **ON_ACCELERATORS}[name]
    found: Any = measure(a)
    a.out.mkdir(parents=True, exist_ok=True)
    write_whole(a.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    print(f"{name}: {(part.__doc__ or '').splitlines()[0]}\n\n{part.table(found)}\n\n{a.out / f'{name}.json'}\n", flush=True)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("part", choices=[*PARTS, *ON_ACCELERATORS, "all"], help="what is measured")
    parser.add_argument("recipe", nargs="*", metavar="name, key=value", help="of recipe: a shipped one, and changes to it")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="where the numbers go (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of step and infer (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of gather and load (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1280, help="of sequence (default: %(default)s)")
    parser.add_argument("--model", choices=PUBLISHED, default="1.3b", help="of load: its random weights go to a temporary folder")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the world")
    a = parser.parse_intermixed_args()
    with one_line_errors():
        if a.recipe and a.part not in ON_ACCELERATORS:
            raise UserError(f"{' '.join(a.recipe)}: {a.part} takes no recipe")
        for name, least in (("repeats", 2), ("ranks", 1)):
            if getattr(a, name) < least:
                raise UserError(f"--{name} {getattr(a, name)}: must be at least {least}")
        for name in PARTS if a.part == "all" else [a.part]:
            run(name, a)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Distils a Wan2.1 video model with DMD2.

    python dmd_ds/train.py tiny output_dir=outputs/tiny generator.lr=1e-5      # one rank; --dry-run builds nothing
    deepspeed --hostfile hostfiles/8node dmd_ds/train.py t2v_14b_480p model.path=... data.path=...

RECIPE is a recipe that ships or a YAML file. Without one: Wan2.1 T2V 14B at 480p where there is an accelerator, `tiny` where
there is none. The same command goes on where a run stopped.
"""

import argparse
import os
from pathlib import Path

import torch

from dmd_ds.commands import command_parser
from dmd_ds.errors import one_line_errors
from dmd_ds.inputs import check_inputs
from dmd_ds.monitor import log_of_other_ranks
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import described_recipes, load_recipe
from dmd_ds.stopping import alone_in
from dmd_ds.trainer import Trainer


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, epilog="keys and their meaning: dmd_ds/recipe.py, or a recipe that ships in dmd_ds/recipes")
    parser.add_argument("--list-recipes", action="version", version=described_recipes(), help="list the recipes that ship, and exit")
    parser.add_argument("recipe", nargs="?", help="a shipped recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. generator.lr=1e-6 max_steps=500")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, build nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args()
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    return arguments


def main() -> None:
    arguments = parse()
    speaks = int(os.environ.get("RANK", 0)) == 0
    name, why = arguments.recipe, "as asked for"
    if name is None:
        name, why = ("t2v_14b_480p", "an accelerator is there") if torch.cuda.is_available() else ("tiny", "no accelerator is there")
    if speaks:
        print(f"recipe {name}: {why}", flush=True)
    with one_line_errors():
        inputs = check_inputs(load_recipe(name, arguments.overrides))
        if speaks:
            print(inputs.summary(), flush=True)
        if not arguments.dry_run:
            run = Path(inputs.recipe.output_dir)
            with joined(inputs.recipe.parallel) as mesh, alone_in(run, mesh), log_of_other_ranks(run, mesh.rank):
                Trainer(inputs, mesh).train()


if __name__ == "__main__":
    main()

"""What test_splits.py runs on some ranks: python -m tests.distributed.split_ranks RECIPE.yaml ...

Trains one recipe after the other, each laid out by its own degrees over the same ranks.
"""

import sys

from dmd_ds.inputs import check_inputs
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel, load_recipe
from dmd_ds.trainer import Trainer
from tests.distributed.attention_ranks import lay


def main() -> None:
    with joined(Parallel()) as world:
        for file in sys.argv[1:]:
            recipe = load_recipe(file)
            Trainer(check_inputs(recipe), lay(world, recipe.parallel.ulysses, recipe.parallel.ring)).train()


if __name__ == "__main__":
    main()

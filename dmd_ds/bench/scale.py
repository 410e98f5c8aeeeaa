"""How seconds and bytes of an iteration grow with tokens, ranks and parameters: the fitted exponent beside the expected one.

An iteration is a generator update and the k fake-score updates of its ratio; bytes are what a rank gathers and reduces. Growth is
`size ** exponent`, fitted over all sizes. Expected seconds are those of the operations, of which attention's grow with the square
of the tokens. Ranks of one machine share its cores, so over ranks seconds say something on accelerators only.
"""

import dataclasses
import math
import statistics
import time

from deepspeed.accelerator import get_accelerator

from dmd_ds.bench.counting import Collectives
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, recipe_of, trainer_of, written
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.cost import collectives, flops
from dmd_ds.planner.sizes import Precision, Setup
from dmd_ds.recipe import Parallel

WARM, TIMED = 1, 3  # iterations


def on_rank(world: dict, folder: str) -> dict[str, float]:
    world = World(**world)
    with joined(Parallel()) as mesh:
        trainer = trainer_of(world, recipe_of(world, folder), mesh)
        k = trainer.recipe.fake_score.updates_per_generator_update
        exits = {"exit": "last"}  # every iteration has the same passes
        trainer.stage.recipe = trainer.recipe.model_copy(update={"rollout": trainer.recipe.rollout.model_copy(update=exits)})
        seconds, counts = [], Collectives()
        for number in range(WARM + TIMED):
            get_accelerator().synchronize()
            began = time.perf_counter()
            for step in range(number * k, (number + 1) * k):
                trainer.step(step)
            get_accelerator().synchronize()
            seconds.append(time.perf_counter() - began)
        with counts:
            for step in range(number * k, (number + 1) * k):
                trainer.step(step)
        trainer.monitor.close()
        sends = mesh.world_size > 1  # a collective of one rank alone moves nothing
    moved = counts.gathered.total() + counts.reduced.total() if sends else 0
    return {"seconds": statistics.median(seconds[WARM:]), "bytes": moved}


def expected(world: World, ranks: int) -> dict[str, float]:
    """Operations and bytes of an iteration, by the planner; one rank alone gathers nothing."""
    adapter = recipe_of(world, "").fake_score.lora_rank
    sizes = {"text_tokens": world.text, "lora_rank": adapter, "exits_last": True, "precision": Precision(weights=4)}
    moved = collectives(Setup(world.model, world.latents_shape[1:], gpus=2, **sizes))  # half of which is a rank's own
    whole = 2 * (moved["all-gather of weights"] + moved["reduce-scatter of gradients"])
    return {"seconds": flops(Setup(world.model, world.latents_shape[1:], gpus=1, **sizes)), "bytes": whole if ranks > 1 else 0}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Of the power law nearest to these in logarithms; what is 0 is left out."""
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes, values, strict=True) if value]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def series(base: World) -> dict[str, list[tuple[float, World, int]]]:
    """By what grows: (how large, the world, ranks)."""
    wider = [dataclasses.replace(base, heads=round(base.heads * times**0.5)) for times in (1, 2, 4, 8)]
    weights = [sum(world.model.weights()) for world in wider]
    return {
        "tokens": [(n, dataclasses.replace(base, frames=base.frames * n), 2) for n in (1, 2, 4, 8, 16)],
        "ranks": [(n, base, n) for n in (1, 2, 4)],
        "parameters": [(count / weights[0], world, 2) for count, world in zip(weights, wider, strict=True)],
    }


def measure(base: World) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for name, sizes in series(base).items():
        for size, world, ranks in sizes:
            with written(world) as folder:
                measured = run_ranks("scale", ranks, world=world.__dict__, folder=folder)
            found.setdefault(name, []).append({"size": size, "measured": measured, "expected": expected(world, ranks)})
    return found


def table(found: dict[str, list[dict]]) -> str:
    lines = ["| grows | sizes | seconds | exponent | expected | bytes a rank, MB | exponent | expected |", "|---" * 8 + "|"]
    for name, rows in found.items():
        sizes = [row["size"] for row in rows]
        cells = [name, " ".join(f"{size:.3g}" for size in sizes)]
        for what, unit in (("seconds", 1), ("bytes", 1e6)):
            cells.append(" ".join(f"{row['measured'][what] / unit:.3g}" for row in rows))
            cells += [f"{exponent(sizes, [row[side][what] for row in rows]):.2f}" for side in ("measured", "expected")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

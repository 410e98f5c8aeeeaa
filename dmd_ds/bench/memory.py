"""What a rank holds between steps, against ZeRO-3's theory, and what a step adds at its peak, against what it should grow with.

Every tensor that is alive is counted, so the numbers are those of any device in float32; what an allocator loses is not among them.
"""

import dataclasses
import gc

from dmd_ds.bench.live_bytes import LiveBytes
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, recipe_of, trainer_of, written
from dmd_ds.parallel.engine import read_ds_config
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.memory import always
from dmd_ds.planner.sizes import Precision, Setup, Zero
from dmd_ds.recipe import Parallel, Recipe

STEPS = 3  # past the first, in which DeepSpeed records the order of the modules
BASE = World(layers=3, heads=2, head_dim=32, frames=4, height=8, width=8)
ONE_RANK = {"ranks": 1, "ulysses": 1, "checkpointing": True}

# name, the world, and how it is run
CASES = [
    ("tokens x 1", BASE, ONE_RANK),
    ("tokens x 2", dataclasses.replace(BASE, frames=8), ONE_RANK),
    ("tokens x 4", dataclasses.replace(BASE, frames=16), ONE_RANK),
    ("tokens x 8", dataclasses.replace(BASE, frames=32), ONE_RANK),
    ("tokens x 8, 2 ranks a sample", dataclasses.replace(BASE, frames=32), {**ONE_RANK, "ranks": 2, "ulysses": 2}),
    ("tokens x 4, layers x 2", dataclasses.replace(BASE, frames=16, layers=6), ONE_RANK),
    ("tokens x 4, no checkpointing", dataclasses.replace(BASE, frames=16), {**ONE_RANK, "checkpointing": False}),
    ("tokens x 4, layers x 2, no checkpointing", dataclasses.replace(BASE, frames=16, layers=6), {**ONE_RANK, "checkpointing": False}),
    ("width x 4, 2 ranks", dataclasses.replace(BASE, heads=8), {**ONE_RANK, "ranks": 2}),
]


def theory(world: World, ranks: int, recipe: Recipe) -> dict[str, float]:
    """Bytes by cause: parts of a rank, by ZeRO-3, and the buffers that its settings ask for."""
    sections = {"generator": recipe.generator, "fake_score": recipe.fake_score}
    files = {name: read_ds_config(f"{name}.ds_config", section.ds_config) for name, section in sections.items()}
    zeros = {name: Zero.from_ds_config(file, world.model) for name, file in files.items()}
    setup = Setup(
        world.model, world.latents_shape[1:], ranks, recipe.parallel.ulysses, lora_rank=recipe.fake_score.lora_rank, validation=False,
        generator_zero=zeros["generator"], fake_score_zero=zeros["fake_score"], precision=Precision(weights=4, accelerator=False),
    )  # fmt: skip
    return always(setup)


def on_rank(world: dict, folder: str, ulysses: int, checkpointing: bool) -> dict[str, float]:
    world = World(**world)
    parallel = Parallel(ulysses=ulysses)
    with joined(parallel) as mesh:
        recipe = recipe_of(world, folder, parallel=parallel.model_dump(), activation_checkpointing=checkpointing)
        with LiveBytes() as live:
            trainer = trainer_of(world, recipe, mesh)
            gc.collect()
            peaks = {"generator": 0, "fake score": 0}
            for step in range(STEPS):
                batches = trainer.batches(step)
                for name, run in (("generator", trainer.stage.generator_step), ("fake score", trainer.stage.fake_score_step)):
                    live.reset()
                    run(batches, step)
                    peaks[name] = max(peaks[name], live.peak)
            standing = live.live
        trainer.monitor.close()
        causes = theory(world, mesh.world_size, recipe)
    added = {name: peak - standing for name, peak in peaks.items()}
    return {"standing": standing, "theory": sum(causes.values()), "by_cause": causes, "added": added}


def measure() -> list[dict]:
    rows = []
    for name, world, how in CASES:
        arguments = {key: value for key, value in how.items() if key != "ranks"}
        with written(world) as folder:
            found = run_ranks("memory", how["ranks"], world=world.__dict__, folder=folder, **arguments)
        rows.append({"case": name, "layers": world.layers, "rank_tokens": world.tokens // how["ulysses"], **how, **found})
    return rows


def table(rows: list[dict]) -> str:
    adds = "generator's step adds, MB | a token, KB | fake score's adds, MB | a token, KB |"
    lines = ["| case | tokens a rank | held between steps, MB | / theory | " + adds, "|---" * 8 + "|"]
    for row in rows:
        cells = [row["case"], f"{row['rank_tokens']}", f"{row['standing'] / 1e6:.2f}", f"{row['standing'] / row['theory']:.3f}"]
        for name in ("generator", "fake score"):
            added = row["added"][name]
            cells += [f"{added / 1e6:.2f}", f"{added / row['rank_tokens'] / 1e3:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

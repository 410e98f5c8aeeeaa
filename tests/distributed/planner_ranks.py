"""Trains mini models and measures their live bytes: `python -m tests.distributed.planner_ranks FOLDER`, on each rank.

Runs the cases of FOLDER/cases.json one after the other; rank 0 writes FOLDER/measured.json.
"""

import gc
import json
import logging
import sys
from pathlib import Path

from dmd_ds.bench.live_bytes import LiveBytes
from dmd_ds.inputs import check_inputs
from dmd_ds.parallel.mesh import Mesh, joined
from dmd_ds.planner.memory import memory
from dmd_ds.planner.sizes import ModelSize, Precision, Setup, Zero
from dmd_ds.recipe import Parallel, Recipe
from dmd_ds.trainer import Trainer
from tests import mini

CPU = Precision(weights=4, accelerator=False)
STEPS = 3  # past the first, in which DeepSpeed records the order of the modules


def recipe_of(case: dict, folder: Path, mesh: Mesh) -> Recipe:
    """A mini model of the case's size, its data and its recipe; the first rank writes them for all."""
    mini.TRANSFORMER |= {
        "num_attention_heads": 2,
        "attention_head_dim": case["width"] // 2,
        "ffn_dim": 4 * case["width"],
        "num_layers": case["layers"],
    }
    mini.LATENTS_SHAPE = (4, case["frames"], 8, 8)
    ds_config = json.loads(Path("ds_configs/generator_zero3.json").read_text())
    ds_config["zero_optimization"] |= {
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": case.get("prefetch", 0),
        "stage3_max_live_parameters": case.get("max_live", 10**9),
        "stage3_param_persistence_threshold": 1000,
    }
    file = folder / "ds.json"
    if mesh.is_first:
        folder.mkdir()
        file.write_text(json.dumps(ds_config))
        mini.make_pipeline(folder / "model")
        mini.make_dataset(folder / "data", shapes=(mini.LATENTS_SHAPE,))
    mesh.barrier()
    engine = {"ds_config": str(file)}
    generator = {**engine, "lora_rank": case.get("generator_lora_rank")}
    return mini.make_recipe(
        folder,
        data={"batch_size": case.get("batch", 1)},
        activation_checkpointing=case.get("checkpointing", True),
        generator=generator,
        fake_score={**engine, "updates_per_generator_update": 1},
        gan=case.get("gan", {}),
        sampling={"steps": 3},
        rollout={"exit": "last"},  # what is planned is the longest rollout, the one before whose last forward all weights are whole
        parallel={"ulysses": case.get("ulysses", 1), "ring": case.get("ring", 1)},
    )


def measure(recipe: Recipe, mesh: Mesh, steps: int) -> dict[str, float]:
    """Peaks of so many trainer steps, in bytes; the data and the prompts on the host are part of it."""
    with LiveBytes() as live:
        trainer = Trainer(check_inputs(recipe), mesh)
        gc.collect()
        peaks = {"generator": 0, "fake score": 0}
        for step in range(steps):
            batches = trainer.batches(step)
            for name, run in (("generator", trainer.stage.generator_step), ("fake score", trainer.stage.fake_score_step)):
                live.reset()
                run(batches, step)
                peaks[name] = max(peaks[name], live.peak)
        peaks["standing"] = live.live
        trainer.monitor.close()
        for engine in trainer.stage.engines.values():
            engine.destroy()
    return peaks


def planned(recipe: Recipe, case: dict, ranks: int, prompt_tokens: int) -> dict[str, float]:
    model = ModelSize(
        layers=case["layers"], heads=2, head_dim=case["width"] // 2, ffn=4 * case["width"],
        text_dim=mini.TEXT_WIDTH, freq_dim=32, in_channels=4, out_channels=4,
    )  # fmt: skip
    zero = Zero.from_ds_config(json.loads(Path(recipe.generator.ds_config).read_text()), model)
    plan = memory(
        Setup(
            model, (case["frames"], 8, 8), ranks, recipe.parallel.ulysses, recipe.parallel.ring, recipe.data.batch_size, prompt_tokens,
            checkpointing=recipe.activation_checkpointing, generator_lora_rank=recipe.generator.lora_rank, validation=False,
            lora_rank=recipe.fake_score.lora_rank, gan=recipe.gan,
            generator_zero=zero, fake_score_zero=zero, precision=CPU,
        )
    )  # fmt: skip
    return {
        "generator": plan.step_peak("generator"),
        "fake score": plan.step_peak("fake score"),
        "standing": plan.standing,
        "phases": {phase: plan.of(phase) for phase in plan.phases},
    }


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    cases = json.loads((folder / "cases.json").read_text())
    found = []
    with joined(Parallel(ulysses=cases[0].get("ulysses", 1), ring=cases[0].get("ring", 1))) as mesh:
        for number, case in enumerate(cases):
            recipe = recipe_of(case, folder / f"case_{number}", mesh)
            measured = measure(recipe, mesh, case.get("steps", STEPS))
            found.append({"case": case, "measured": measured, "planned": planned(recipe, case, mesh.world_size, 8)})
    if mesh.is_first:
        (folder / "measured.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

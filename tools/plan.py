#!/usr/bin/env python3
"""Says on paper what a recipe needs: memory a GPU, bytes moved, seconds a step, and the cheapest settings that fit.

    python tools/plan.py t2v_14b_480p --gpus 8 [--gpu-memory 80] [key=value ...]

Needs no weights, no data and no GPU. The memory is held against real steps of small models (tests/distributed/
test_planner_accuracy.py); CUDA's context, NCCL's buffers and the allocator's fragments come on top, for which --reserve is left.
Seconds are estimates for comparison: of one setting with another, of one machine with another.
"""

import json
from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors, read_json_mapping
from dmd_ds.parallel.engine import parse_ds_config
from dmd_ds.planner.choose import Plan, cheapest, plan
from dmd_ds.planner.cost import Machine, between_nodes, collectives
from dmd_ds.planner.sizes import PUBLISHED, ModelSize, Setup, Video, published_size, setup_of
from dmd_ds.recipe import PACKAGE, Recipe, find_ds_config, load_recipe, validated
from dmd_ds.wan.diffusers_parts import Transformer

GB = 1e9


def model_size(recipe: Recipe, name: str) -> ModelSize:
    """Of the model's own configuration where it lies on disk, else of the published size that the names speak of."""
    for folder in (Path(recipe.model.path), PACKAGE / "assets" / recipe.model.path):
        if (folder / "transformer" / "config.json").is_file():
            path = folder / "transformer" / "config.json"
            return ModelSize.from_config(validated(Transformer, read_json_mapping(path), str(path)).model_dump())
    size = published_size(recipe.model.path, name)
    if size is None:
        known = " or ".join(PUBLISHED)
        raise UserError(f"model.path={recipe.model.path} is not on disk, and neither it nor {name!r} names a published size, {known}")
    return size


def table(title: str, terms: dict[str, float], unit: float = GB) -> str:
    rows = [f"  {size / unit:>9.2f}  {name}" for name, size in sorted(terms.items(), key=lambda item: -item[1])]
    return "\n".join([f"{title}: {sum(terms.values()) / unit:.2f} GB", *rows])


def describe(found: Plan, machine: Machine) -> str:
    memory, setup, seconds = found.memory, found.setup, found.seconds
    latents = "x".join(map(str, setup.latents))
    phases = [f"  {memory.of(phase) / GB:>9.2f}  {phase}" for phase in memory.phases]
    moved = collectives(setup)
    fits = "fits" if memory.peak <= machine.usable else "does NOT fit"
    return "\n".join(
        [
            f"{sum(setup.model.weights()) / 1e9:.2f} B weights, latents {latents}, {setup.tokens:,} tokens; {setup.gpus} GPUs = data "
            f"{setup.gpus // setup.a_sample} x ulysses {setup.ulysses} x ring {setup.ring}",
            "",
            table("GB a GPU, all the time", memory.always),
            "",
            "GB a GPU at the peak of each phase",
            *phases,
            "",
            table(f"on top at the peak, in {memory.peak_phase!r}", memory.phases[memory.peak_phase]),
            f"peak {memory.peak / GB:.2f} GB a GPU: {fits} into {machine.memory / GB:.0f} GB less {machine.reserve / GB:.0f} in reserve",
            "",
            table("GB a GPU sends a step", {name: size for name, size in moved.items() if size}),
            f"  {between_nodes(setup, machine) / GB:>9.2f}  of these between nodes",
            "",
            f"seconds a step, estimated: {seconds.step:.1f} (compute {seconds.compute:.1f}, weights {seconds.weights:.1f} beside it, "
            f"attention's exchange {seconds.attention:.1f}, offload {seconds.offload:.1f}); {found.seconds_a_sample:.2f} a sample",
        ]
    )


def advice(setup: Setup, machine: Machine) -> dict[str, Plan | None]:
    found = {"generator trained whole": cheapest(setup, machine, whole_generator=True)} if not setup.generator_lora else {}
    return found | {"generator whole or LoRA": cheapest(setup, machine, whole_generator=False)}


def as_json(found: Plan, machine: Machine) -> dict:
    memory, setup = found.memory, found.setup
    return {
        "settings": found.keys(),
        "tokens": setup.tokens,
        "peak_bytes": memory.peak,
        "peak_phase": memory.peak_phase,
        "always_bytes": memory.always,
        "phases_bytes": memory.phases,
        "sent_bytes": collectives(setup) | {"between nodes": between_nodes(setup, machine)},
        "seconds_a_step": found.seconds.step,
        "seconds_a_sample": found.seconds_a_sample,
    }


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("recipe", help="the name of a shipped recipe, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--gpus", type=int, required=True, help="of the whole job")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB a GPU (default: %(default)s)")
    parser.add_argument("--reserve", type=float, default=5, help="GB of it left free (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="of a video, 4 n + 1 (default: %(default)s)")
    parser.add_argument("--height", type=int, help="480, or 720 where the recipe's name says 720p")
    parser.add_argument("--width", type=int, help="832, or 1280")
    parser.add_argument("--gpu-tflops", type=float, default=989, help="peak in bf16, without sparsity (default: %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.4, help="the part of the peak that is reached (default: %(default)s)")
    parser.add_argument("--nvlink-gbs", type=float, default=400, help="GB/s a GPU sends inside a node (default: %(default)s)")
    parser.add_argument("--network-gbs", type=float, default=400, help="GB/s a node sends to others (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    a = parser.parse_intermixed_args()
    with one_line_errors():
        for name in ("gpus", "gpu_memory", "gpus_per_node", "frames", "gpu_tflops", "mfu", "nvlink_gbs", "network_gbs"):
            if getattr(a, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be more than 0")
        recipe = load_recipe(a.recipe, a.overrides)
        if recipe.fake_score is None:
            raise UserError(f"{a.recipe}: stage={recipe.stage}; the memory of DMD2 alone is planned")
        hd = "720p" in a.recipe
        video = Video(a.frames, a.height or (720 if hd else 480), a.width or (1280 if hd else 832))
        ds_configs = {
            name: parse_ds_config(find_ds_config(f"{name}.ds_config", section.ds_config))
            for name, section in (("generator", recipe.generator), ("fake_score", recipe.fake_score))
        }
        setup = setup_of(recipe, model_size(recipe, a.recipe), video, a.gpus, ds_configs)
        if setup.a_sample > a.gpus_per_node:
            raise UserError(f"a sample over {setup.a_sample} GPUs is more than the {a.gpus_per_node} of --gpus-per-node")
    rates = {"flops": a.gpu_tflops * 1e12, "mfu": a.mfu, "nvlink": a.nvlink_gbs * GB, "network": a.network_gbs * GB}
    machine = Machine(gpus_per_node=a.gpus_per_node, memory=a.gpu_memory * GB, reserve=a.reserve * GB, **rates)
    own, best = plan(setup, machine), advice(setup, machine)
    print(describe(own, machine))
    print(f"\ncheapest that fit into {machine.usable / GB:.0f} GB, by seconds a sample")
    for name, found in best.items():
        numbers = f"{found.memory.peak / GB:.1f} GB, {found.seconds_a_sample:.2f} s: {' '.join(found.keys())}" if found else "none"
        print(f"  {name}: {numbers}")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        choices = {name: as_json(found, machine) if found else None for name, found in best.items()}
        a.json.write_text(json.dumps({"own": as_json(own, machine), "cheapest": choices}, indent=1) + "\n")


if __name__ == "__main__":
    main()

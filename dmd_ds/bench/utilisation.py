"""What of an accelerator's peak an iteration reaches, and how much of the communication runs beside computation.

An iteration is a generator update and the k fake-score updates of its ratio, over all accelerators of this machine. Operations are
those of the algorithm: what activation checkpointing runs again is not counted (model FLOP utilisation).
"""

import statistics
import time

import torch
from deepspeed.accelerator import get_accelerator
from torch.autograd import DeviceType

from dmd_ds.bench.world import World, recipe_of, trainer_of
from dmd_ds.parallel.mesh import joined
from dmd_ds.planner.cost import Machine, flops
from dmd_ds.planner.sizes import Setup
from dmd_ds.recipe import Parallel

WARM, TIMED = 2, 5  # iterations

Span = tuple[float, float]


def merged(spans: list[Span]) -> list[Span]:
    """The same times as spans that do not touch, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def hidden_share(kernels: list[tuple[str, float, float]]) -> float | None:
    """Of the time in which ranks communicate, the share in which something is computed too; None where they do not.

    `kernels`: name, start and end of what ran on the accelerator; NCCL's say so.
    """
    sent = merged([(start, end) for name, start, end in kernels if "nccl" in name.lower()])
    computed = merged([(start, end) for name, start, end in kernels if "nccl" not in name.lower()])
    if not sent:
        return None
    either = length(merged(sent + computed))
    return (length(sent) + length(computed) - either) / length(sent)


def on_rank(world: dict, folder: str) -> dict[str, float | None]:
    """Median seconds of an iteration, its operations on one accelerator, and the hidden share of one iteration."""
    world = World(**world)
    with joined(Parallel()) as mesh:
        trainer = trainer_of(world, recipe_of(world, folder, rollout={"exit": "last"}), mesh)  # every iteration has the same passes
        fake_score = trainer.recipe.fake_score
        assert fake_score
        k = fake_score.updates_per_generator_update

        def iteration(number: int) -> None:
            for step in range(number * k, (number + 1) * k):
                trainer.step(step)
            get_accelerator().synchronize()

        seconds = []
        for number in range(WARM + TIMED):
            began = time.perf_counter()
            iteration(number)
            seconds.append(time.perf_counter() - began)
        with torch.profiler.profile() as profile:
            iteration(WARM + TIMED)
        trainer.monitor.close()
        setup = Setup(
            world.model, world.latents_shape[1:], gpus=mesh.world_size, batch=world.batch, text_tokens=world.text, checkpointing=False,
            lora_rank=fake_score.lora_rank, generator_every=k, exits_last=True,
        )  # fmt: skip
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    kernels = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    return {"seconds": statistics.median(seconds[WARM:]), "flops": k * flops(setup), "hidden": hidden_share(kernels)}


def lines(found: dict[str, float | None], peak: float = Machine().flops) -> list[str]:
    """Rows of a table; `peak` in operations a second."""
    assert found["flops"] and found["seconds"]
    share = found["flops"] / found["seconds"] / peak
    hidden = "no communication" if found["hidden"] is None else f"{found['hidden']:.1%}"
    return [
        f"| model FLOP utilisation of {peak / 1e12:.0f} TFLOP/s | {share:.1%} | | |",
        f"| communication beside computation | {hidden} | | |",
    ]

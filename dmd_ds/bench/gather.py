"""Bytes all-gathered and reduced an iteration and a rank, counted at the collective, against the least that ZeRO-3 can do.

An iteration is a generator update and the k fake-score updates of its ratio; a unit is the weights of the model that are cut up.
The least: a rollout gathers the generator once, the scores together gather theirs once, and so does each forward and each backward
of an update; each update reduces what it trains once. `naive` is the order of a loop that knows nothing of gathering: each forward
of a rollout for itself, and fake, conditional and unconditional score one after the other.
"""

import torch

from dmd_ds.bench.counting import Collectives
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, recipe_of, trainer_of, written
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel
from dmd_ds.trainer import Trainer

GATHER = ("each", "rollout", "update")
Bytes = dict[str, float]


def cut_bytes(module: torch.nn.Module, trained: bool = False) -> int:
    """Bytes of the weights that ZeRO-3 cuts up and gathers: all, or those that are trained."""
    parameters = [p for p in module.parameters() if not p.ds_persist and (p.requires_grad or not trained)]
    return sum(p.ds_numel * p.element_size() for p in parameters)


def watch(trainer: Trainer, counts: Collectives) -> None:
    """Names the phases of the trainer's steps for the count."""
    dmd2, engines = trainer.stage, trainer.stage.engines
    for owner, method, phase in (
        (dmd2, "generated", "generator: rollout"),
        (dmd2, "distribution_matching", "scores"),
        (engines["fake_score"], "forward", "fake score: forward"),
        (engines["generator"], "backward", "generator: backward"),
        (engines["fake_score"], "backward", "fake score: backward"),
        (engines["generator"], "step", "generator: update"),
        (engines["fake_score"], "step", "fake score: update"),
    ):
        setattr(owner, method, counts.during(phase, getattr(owner, method)))


def least_and_naive(trainer: Trainer, first: int, steps: int) -> dict[str, Bytes]:
    """Bytes gathered and reduced by the steps, in the best order and in the naive one."""
    generator, score = (trainer.stage.engines[name].module for name in ("generator", "fake_score"))
    G, S, recipe = cut_bytes(generator), cut_bytes(score), trainer.recipe
    due = [step for step in range(first, first + steps) if recipe.is_generator_due(step)]
    rollouts = [(step, "generator") for step in due] + [(step, "fake_score") for step in range(first, first + steps)]
    forwards = sum(trainer.stage.exit_step(*rollout) + 1 for rollout in rollouts)
    updates = len(due) * G + 2 * steps * S  # backwards of the generator; forwards and backwards of the score
    reduced = len(due) * cut_bytes(generator, trained=True) + steps * cut_bytes(score, trained=True)
    return {
        "least": {"gathered": len(rollouts) * G + len(due) * S + updates, "reduced": reduced},
        "naive": {"gathered": forwards * G + 3 * len(due) * S + updates, "reduced": reduced},
    }


def on_rank(world: dict, folder: str, gather: str, iterations: int) -> dict[str, Bytes]:
    world = World(**world)
    with joined(Parallel()) as mesh:
        trainer = trainer_of(world, recipe_of(world, folder, parallel={"gather": gather}), mesh)
        k = trainer.recipe.fake_score.updates_per_generator_update
        counts = Collectives()
        watch(trainer, counts)
        with counts:
            for step in range(k):  # in which DeepSpeed learns the order of the modules
                trainer.step(step)
            counts.gathered.clear()
            counts.reduced.clear()
            for step in range(k, k * (1 + iterations)):
                trainer.step(step)
        found = {"gathered": dict(counts.gathered), "reduced": dict(counts.reduced)}
        found |= least_and_naive(trainer, k, k * iterations)
        trainer.monitor.close()
    return found | {"generator": cut_bytes(trainer.stage.engines["generator"].module), "iterations": iterations}


def measure(world: World, ranks: int, iterations: int) -> dict[str, dict[str, Bytes]]:
    """By what stays whole: bytes of a rank, by phase, beside the least and the naive order's."""
    found = {}
    for gather in GATHER:
        with written(world) as folder:
            found[gather] = run_ranks("gather", ranks, world=world.__dict__, folder=folder, gather=gather, iterations=iterations)
    return found


def table(found: dict[str, dict[str, Bytes]]) -> str:
    """In whole generators an iteration."""
    phases = list(dict.fromkeys(phase for one in found.values() for phase in (*one["gathered"], *one["reduced"])))
    lines = ["| parallel.gather | " + " | ".join(phases) + " | gathered | / least | / naive | reduced | / least |"]
    lines.append("|---" * (len(phases) + 6) + "|")
    for gather, one in found.items():
        unit = one["generator"] * one["iterations"]
        gathered, reduced = sum(one["gathered"].values()), sum(one["reduced"].values())
        cells = [f"{one['gathered'].get(phase, 0) / unit:.2f}" for phase in phases]
        cells += [f"{gathered / unit:.2f}", f"{gathered / one['least']['gathered']:.3f}", f"{gathered / one['naive']['gathered']:.3f}"]
        cells += [f"{reduced / unit:.2f}", f"{reduced / one['least']['reduced']:.3f}"]
        lines.append(f"| {gather} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

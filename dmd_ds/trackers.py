"""Where a run's numbers go beside metrics.jsonl, by the words of the recipe's `trackers`."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from dmd_ds.errors import UserError
from dmd_ds.recipe import Recipe

PROJECT = "dmd_ds"


class Tracker(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Files in `tensorboard/` of the run."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int):
        self.writer = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project `dmd_ds` that a resumed run goes on with; where and as whom is told by the environment alone."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int):
        import wandb

        number = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(project=PROJECT, name=run.name, id=number, dir=str(run), resume="allow", config=settings(recipe))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of the project `dmd_ds`, kept on this machine; `trackio show` opens it."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int):
        import trackio

        self.run = trackio.init(project=PROJECT, name=run.name, resume="allow", config=settings(recipe))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, Recipe, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def check_trackers(recipe: Recipe) -> None:
    """`UserError` for one that is not installed."""
    for name in recipe.trackers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"trackers={list(recipe.trackers)}: {name} is not installed; pip install {name}, or leave it out")


def open_trackers(run: Path, recipe: Recipe, first_step: int) -> list[Tracker]:
    return [TRACKERS[name](run, recipe, first_step) for name in recipe.trackers]

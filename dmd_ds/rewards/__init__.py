"""Rewards: how good frames are, as numbers with a gradient.

A reward is a function of frames `[B, T, 3, H, W]` in [0, 1] and their B prompts; it gives `[B]`, more is better. A recipe names
one by an entry point of the group `dmd_ds.rewards`, or as `module:function` of a module that is installed or lies in the current
folder. With a path beside its weight what is named is called with that path first, and gives the reward.
"""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from dmd_ds.errors import UserError
from dmd_ds.stages import RewardTerm

GROUP = "dmd_ds.rewards"

Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]


def find_rewards(terms: dict[str, RewardTerm]) -> dict[str, Reward]:
    return {name: find_reward(name, term.path) for name, term in terms.items()}


def find_reward(name: str, path: str | None = None) -> Reward:
    found = find_plugin(name)
    return found if path is None else found(Path(path))


def check_rewards(terms: dict[str, RewardTerm]) -> None:
    """`UserError` names what is not there; no weights are loaded."""
    for name, term in terms.items():
        find_plugin(name)
        if term.path is not None and not Path(term.path).exists():
            raise UserError(f"reward.rewards: {name}: path={term.path}: no such file or folder")


def find_plugin(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon:
        points = entry_points(group=GROUP)
        if name not in points.names:
            there = ", ".join(sorted(points.names)) or "none"
            raise UserError(f"reward.rewards: no entry point {name!r} of {GROUP} ({there} installed), and not of the form module:function")
        return points[name].load()
    if os.getcwd() not in sys.path:  # a script's own folder is there instead
        sys.path.append(os.getcwd())
    try:
        found = vars(importlib.import_module(module)).get(function)
    except ImportError as error:
        raise UserError(f"reward.rewards: {name}: cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"reward.rewards: {name}: {module} has no function {function}")
    return found


def check_scores(name: str, scores_B: torch.Tensor, count: int) -> torch.Tensor:
    """The scores themselves; `UserError` for what a reward may not give."""
    if not torch.is_tensor(scores_B) or scores_B.shape != (count,):
        shape = list(scores_B.shape) if torch.is_tensor(scores_B) else type(scores_B).__name__
        raise UserError(f"reward.rewards: {name} gives {shape} for {count} videos, expected a tensor of [{count}]")
    return scores_B

"""What two runs are compared by: the numbers they logged and the weights they saved."""

import json
from pathlib import Path

import pytest
import torch

from dmd_ds.recipe import Recipe
from dmd_ds.shards import Shards
from tests.mini import make_dataset, make_pipeline, make_recipe

EPSILON = 1e-6
EMA_DECAY = 0.2  # reached at the second update
LOGGED = (
    "loss/dm", "grad_norm/generator", "loss/fake_score", "grad_norm/fake_score",
    "loss/regression", "loss/gan_generator", "loss/gan_discriminator", "loss/r1",
)  # fmt: skip


def sharp_recipe(folder: Path, name: str, **changes) -> Recipe:
    """A mini recipe under which a wrong gradient, norm or gather cannot hide."""
    if not (folder / "model").exists():
        make_pipeline(folder / "model")
        # long captions: of a few words among 512 tokens so little comes through that guidance is near the rounding of float32
        make_dataset(folder / "data", words=200)
    ds_config = folder / "gather_everything.json"  # the mini model is small enough to be kept whole: forbid that
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000}
    # Adam's step for a gradient of 1e-9 is as large as for one of 1: an epsilon above the noise keeps the comparison meaningful
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "fused": True, "eps": EPSILON}}
    ds_config.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer}))
    sections = {
        # clipping well below the norms there are, so that a wrong norm shows in the weights
        "generator": {
            "lr": 1e-3, "warmup_steps": 1, "max_grad_norm": 0.05, "ds_config": str(ds_config), "ema_decay": EMA_DECAY,
            **changes.pop("generator", {}),
        },
        "fake_score": {
            "lr": 1e-3, "warmup_steps": 2, "max_grad_norm": 0.2, "updates_per_generator_update": 2, "lora_rank": 4, "lora_alpha": 8,
            "ds_config": str(ds_config),
        },
    }  # fmt: skip
    return make_recipe(folder, **{"output_dir": str(folder / name), "max_steps": 4, "save_every": 2, **sections, **changes})


def weights(recipe: Recipe, step: int, engine: str) -> dict[str, torch.Tensor]:
    shards = Shards(Path(recipe.output_dir) / "checkpoints" / f"step_{step:06d}" / engine)
    return {name: shards.read(name) for name in shards.shapes}


def averages(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """The generator's averaged weights."""
    return weights(recipe, step, "ema")


def assert_same_numbers(lines: list[dict], others: list[dict], tolerance: float) -> None:
    assert len(lines) == len(others) > 0
    for line, other in zip(lines, others, strict=True):
        for key in LOGGED:
            assert (key in line) == (key in other)
            if key in line:
                assert line[key] == pytest.approx(other[key], rel=tolerance), key


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name].detach(), atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_trained_as(recipe: Recipe, step: int, generator: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> None:
    """A run's weights against those that plain PyTorch trained, by the names of the two models there."""
    assert_same_weights(weights(recipe, step, "generator"), {f"transformer.{name}": w for name, w in generator.items()}, 1e-4)
    expected = {name if name.startswith("head.") else f"transformer.{name}": w for name, w in adapter.items()}
    assert_same_weights(weights(recipe, step, "fake_score"), expected, 1e-4)

"""A Wan2.1 of any size with random weights, random data for it, and the trainer on both: what is measured."""

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from dmd_ds.data.latents import LatentsDataset, LatentsWriter
from dmd_ds.inputs import Inputs
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.parallel.mesh import Mesh
from dmd_ds.planner.sizes import ModelSize
from dmd_ds.recipe import Recipe
from dmd_ds.trainer import Trainer
from dmd_ds.wan.tensors import Spec, save_weights


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of the model and of its videos' latents; `text` tokens a prompt. `ffn` 0 is four times the width."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    ffn: int = 0
    text_dim: int = 64
    freq_dim: int = 64
    frames: int = 5
    height: int = 16
    width: int = 16
    text: int = 30
    batch: int = 1

    @property
    def model(self) -> ModelSize:
        ffn = self.ffn or 4 * self.heads * self.head_dim
        return ModelSize(self.layers, self.heads, self.head_dim, ffn, text_dim=self.text_dim, freq_dim=self.freq_dim)

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        return 16, self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width // 4


def transformer_config(size: ModelSize) -> dict[str, Any]:
    """diffusers' keys."""
    return {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": size.heads, "attention_head_dim": size.head_dim,
        "ffn_dim": size.ffn, "num_layers": size.layers, "in_channels": size.in_channels, "out_channels": size.out_channels,
        "text_dim": size.text_dim, "freq_dim": size.freq_dim, "patch_size": size.patch,
    }  # fmt: skip


def write_model(folder: Path, size: ModelSize, dtype: torch.dtype = torch.bfloat16) -> None:
    """The transformer of a diffusers folder."""
    (folder / "transformer").mkdir(parents=True)
    config = transformer_config(size)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in WanTransformer3DModel.from_config(config).named_parameters()}
    specs = {name: Spec(shape, dtype) for name, shape in shapes.items()}
    save_weights(folder / "transformer", specs, lambda name: 0.02 * random_numbers(shapes[name], dtype))


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of a normal distribution; the same million over and over, since drawing 14 billion takes longer than what is measured."""
    numel = math.prod(shape)
    drawn = torch.randn(min(numel, 2**20), dtype=dtype)
    return drawn.repeat(-(-numel // len(drawn)))[:numel].view(shape)


def write_data(folder: Path, world: World, samples: int = 8) -> None:
    writer = LatentsWriter(folder, 16, torch.randn(1, world.model.text_dim))
    about = {"frames": 4 * world.frames - 3, "height": 8 * world.height, "width": 8 * world.width}
    for number in range(samples):
        embeds_LD = torch.randn(world.text, world.model.text_dim)
        writer.add(torch.randn(world.latents_shape), embeds_LD, caption=f"sample {number}", source=f"{number}.mp4", **about)
    writer.close()


@contextlib.contextmanager
def written(world: World) -> Iterator[str]:
    """A folder with the model and its data, for all ranks of the jobs that are started within."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_model(Path(folder) / "model", world.model)
        write_data(Path(folder) / "data", world)
        yield folder


def recipe_of(world: World, folder: str, **changes: Any) -> Recipe:
    """As the real recipes have it: LoRA fake score, 5 updates a generator update, 4 steps, checkpointing. Sections are merged."""
    tree: dict[str, Any] = {
        "output_dir": f"{folder}/run", "max_steps": 10**6, "model": {"path": f"{folder}/model"},
        "data": {"path": f"{folder}/data", "batch_size": world.batch},
        "generator": {"lr": 1e-6}, "fake_score": {"lr": 1e-6, "lora_rank": 16, "lora_alpha": 16}, "validation": {"every": 0},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(tree)


def trainer_of(world: World, recipe: Recipe, mesh: Mesh) -> Trainer:
    """The trainer itself on that world."""
    dataset = LatentsDataset(recipe.data.path)
    sections = {"generator": recipe.generator, "fake_score": recipe.fake_score}
    ds_configs = {
        name: complete_ds_config(read_ds_config(f"{name}.ds_config", section.ds_config), section, recipe.data, world.model)
        for name, section in sections.items()
    }
    inputs = Inputs(
        recipe=recipe,
        model=Path(recipe.model.path),
        dataset=dataset,
        latents_shapes=[world.latents_shape],
        shown_shape=world.latents_shape,
        video=dataset.video,
        transformer_config=transformer_config(world.model),
        guidance_embedding="none",
        ds_configs=ds_configs,
        resume_from=None,
        first_step=0,
    )
    return Trainer(inputs, mesh)

"""What a run computes does not depend on how it is split over ranks: data, Ulysses, ring, and all of them together."""

import pytest
import torch

from dmd_ds.data.latents import BatchOrder, LatentsDataset
from dmd_ds.randomness import Randomness
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import metrics, train
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import make_dataset

STEPS = 4
# 18 tokens, which 4 ranks share as 5, 5, 5 and 3; and 5, of which the fourth of them gets none at all
SHAPES = ((4, 3, 4, 6), (4, 1, 2, 10))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    # long captions: of a few words among 512 tokens so little comes through that guidance is near the rounding of float32
    make_dataset(folder / "uneven", shapes=SHAPES, words=200)
    return folder


def recipe_for(world, name: str, ulysses: int = 1, ring: int = 1, batch_size: int = 2, **changes):
    parallel = {"ulysses": ulysses, "ring": ring}
    data = {"path": str(world / "uneven"), "batch_size": batch_size}
    return sharp_recipe(world, name, parallel=parallel, data=data, max_steps=STEPS, **changes)


@pytest.fixture(scope="module")
def plain(world):
    return plain_dmd2(recipe_for(world, "plain"), global_batch_size=2, epsilon=EPSILON)


def test_both_sizes_come_up(world):
    recipe = recipe_for(world, "order")
    order = BatchOrder(LatentsDataset(recipe.data.path).buckets(), 2, Randomness(recipe.seed))
    assert {order(step)[0] for step in range(STEPS)} == set(SHAPES)


@pytest.mark.parametrize(
    ("data", "ulysses", "ring"),
    [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4)],
    ids=lambda degree: str(degree),
)
def test_losses_norms_and_weights_are_those_of_plain_pytorch(world, plain, data, ulysses, ring):
    lines, generator, adapter = plain
    recipe = recipe_for(world, f"{data}x{ulysses}x{ring}", ulysses, ring, batch_size=2 // data)
    train(recipe, ranks=data * ulysses * ring)
    assert_same_numbers(metrics(recipe), lines, 1e-4)
    assert_trained_as(recipe, STEPS, generator, adapter)


def test_without_activation_checkpointing_too(world, plain):
    lines, generator, adapter = plain
    recipe = recipe_for(world, "no_checkpointing", ulysses=2, ring=2, activation_checkpointing=False)
    train(recipe, ranks=4)
    assert_same_numbers(metrics(recipe), lines, 1e-4)
    assert_trained_as(recipe, STEPS, generator, adapter)
    early = weights(recipe, 2, "generator")
    assert max(float((early[name] - late).abs().max()) for name, late in weights(recipe, STEPS, "generator").items()) > 1e-5
    assert all(torch.isfinite(weight).all() for weight in early.values())

"""Image to video on 2 ranks, split by data, Ulysses and ring, is the DMD2 of plain PyTorch."""

import pytest

from dmd_ds.recipe import dump_recipe
from tests.distributed.comparing import EPSILON, assert_same_numbers, assert_trained_as, sharp_recipe, weights
from tests.distributed.launch import assert_fine, metrics, run_ranks
from tests.distributed.plain_dmd2 import plain_dmd2
from tests.mini import IMAGE_EMBEDS_SHAPE, make_dataset, make_image_pipeline

STEPS = 4
SPLITS = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]  # data, Ulysses, ring
SHAPES = ((4, 3, 2, 6),)  # 9 tokens, which 2 ranks share as 5 and 4


def recipe_for(world, data: int, ulysses: int, ring: int):
    changes = {"parallel": {"ulysses": ulysses, "ring": ring}, "data": {"batch_size": 2 // data}, "max_steps": STEPS}
    return sharp_recipe(world, f"{data}x{ulysses}x{ring}", **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_to_video")
    make_image_pipeline(folder / "model")
    make_dataset(folder / "data", shapes=SHAPES, words=200, image_embeds_shape=IMAGE_EMBEDS_SHAPE)
    return folder


@pytest.fixture(scope="module")
def trained(world):
    recipes = {split: recipe_for(world, *split) for split in SPLITS}
    files = [world / f"{number}.yaml" for number in range(len(SPLITS))]
    for file, recipe in zip(files, recipes.values(), strict=True):
        file.write_text(dump_recipe(recipe))
    assert_fine(run_ranks(2, "-m", "tests.distributed.split_ranks", *map(str, files)))
    return recipes


@pytest.fixture(scope="module")
def plain(world):
    return plain_dmd2(recipe_for(world, 1, 1, 1), global_batch_size=2, epsilon=EPSILON)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "x".join(map(str, split)))
def test_losses_norms_and_weights_are_those_of_plain_pytorch(trained, plain, split):
    lines, generator, adapter = plain
    assert_same_numbers(metrics(trained[split]), lines, 1e-4)
    assert_trained_as(trained[split], STEPS, generator, adapter)


def test_training_moved_what_sees_the_image(trained):
    recipe = trained[SPLITS[0]]
    for engine, part in (("generator", "image_embedder"), ("generator", "add_k_proj"), ("fake_score", "add_v_proj")):
        early, late = weights(recipe, 2, engine), weights(recipe, STEPS, engine)
        moved = {name: float((early[name] - late[name]).abs().max()) for name in early if part in name}
        assert moved and max(moved.values()) > 1e-4, (engine, part)

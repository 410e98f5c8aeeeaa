"""Whatever a recipe may say is read back as it was written, what it may not is named; a dataset gives back what it was given."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd_ds.data.latents import BatchOrder, FirstFrame, LatentsDataset, LatentsWriter, SizedOrder
from dmd_ds.errors import UserError
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe, dump_recipe, known_keys, load_recipe

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
POSITIVE, COUNT = st.integers(1, 10**6), st.integers(0, 10**6)
ABOVE_0 = st.floats(0, 1e6, exclude_min=True)
RATE = st.floats(0, 1, exclude_min=True, exclude_max=True)
BELOW_1 = st.floats(0, 1, exclude_max=True)
SIZE = st.tuples(*[st.integers(1, 999)] * 3).map(lambda size: "x".join(map(str, size)))
FALLING = st.lists(st.floats(1, 1000), min_size=1, max_size=8, unique=True).map(lambda levels: sorted(levels, reverse=True))

VALID = {  # key -> values that it may have
    "output_dir": TEXT,
    "max_steps": COUNT,
    "save_every": POSITIVE,
    "seed": st.integers(-(2**63), 2**63 - 1),
    "model.path": TEXT,
    "model.guidance_embedding": st.booleans(),
    "data.path": TEXT,
    "data.batch_size": POSITIVE,
    "data.sizes": st.none() | st.lists(SIZE, min_size=1, max_size=3),
    "parallel.ulysses": POSITIVE,
    "generator.lr": ABOVE_0,
    "generator.betas": st.lists(BELOW_1, min_size=2, max_size=2),
    "generator.ema_decay": st.none() | RATE,
    "fake_score.lr": ABOVE_0,
    "fake_score.ds_config": TEXT,
    "score.guidance": st.floats(0, 100),
    "score.sigma_min": st.floats(0, 1),
    "gan.head": st.sampled_from(["token", "convolution"]),
    "gan.blocks": st.none() | st.lists(COUNT, min_size=1, max_size=4),
    "regression.steps": COUNT,
    "rollout.exit": st.sampled_from(["random", "last"]),
    "sampling.timesteps": st.none() | FALLING,
    "sampling.solver": st.sampled_from(["sde", "ode"]),
    "validation.reference": st.none() | TEXT,
}
NEEDED = ("output_dir", "max_steps", "model.path", "data.path", "generator.lr", "fake_score.lr")
WRONG = {  # values that no key of that kind may have
    "max_steps": [-1, 1.5, "many", None, [], {}],
    "seed": [2**63, -(2**63) - 1, "x", 0.5, None],
    "model.path": [3, None, [], {}, "a\0b", True],
    "data.batch_size": [0, -5, "two", 2.5, None, [1]],
    "data.sizes": [[], "5x32x32", ["5x32"], [3], {}],
    "generator.lr": [0, -1e-5, "fast", None, float("inf"), float("nan"), "1e999"],
    "generator.betas": [[0.5], [0.5, 1], [0, 0, 0], "x", 3, [0, float("nan")]],
    "generator.ema_decay": [0, 1, -0.5, "x"],
    "gan.head": ["both", 3, None],
    "sampling.timesteps": [[], [1000, 1000], [1, 2], [1001], [0], ["x"], 3],
    "sampling.steps": [0, 1001, "x", None],
    "validation.every": [-1, "often", None],
}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        *section, leaf = key.split(".")
        holder = tree
        for part in section:
            holder = holder.setdefault(part, {})
        holder[leaf] = value
    return tree


RECIPES = st.fixed_dictionaries({key: VALID[key] for key in NEEDED}, optional={key: VALID[key] for key in VALID if key not in NEEDED})


def load(text: str, overrides: list[str] = ()) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(text, encoding="utf-8")
        return load_recipe(str(file), overrides)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RECIPES)
def test_a_valid_recipe_is_read_back_as_it_was_written(flat):
    assert flat.keys() <= set(known_keys())
    recipe = Recipe.model_validate(nested(flat))
    assert load(dump_recipe(recipe)) == recipe


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RECIPES)
def test_overrides_say_the_same_as_a_file(flat):
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in flat.items()]
    assert load("", overrides) == Recipe.model_validate(nested(flat))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RECIPES, st.sampled_from([(key, value) for key, values in WRONG.items() for value in values]))
def test_a_wrong_value_is_one_line_that_names_file_and_key(flat, wrong):
    key, value = wrong
    with pytest.raises(UserError, match=f"recipe.yaml: {key}[.=0-9]") as error:
        load(json.dumps(nested({**flat, key: value})))
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RECIPES, st.sampled_from(NEEDED), st.text("abcdefgh_", min_size=3))
def test_a_missing_and_an_unknown_key_are_named(flat, missing, unknown):
    with pytest.raises(UserError, match=f"the key {missing.split('.')[0]}(.{missing.split('.')[-1]})? is missing"):
        load(json.dumps(nested({key: value for key, value in flat.items() if key != missing})))
    with pytest.raises(UserError, match=f"unknown key generator.x{unknown}"):
        load(json.dumps(nested({**flat, f"generator.x{unknown}": 1})))


SHAPES = st.sampled_from([(4, 1, 2, 2), (4, 2, 2, 2), (4, 1, 2, 4)])
SAMPLES = st.lists(st.tuples(SHAPES, st.integers(1, 5), TEXT), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SAMPLES, st.integers(1, 4), st.booleans(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_dataset_gives_back_what_was_written(samples, samples_a_shard, images, dtype):
    with tempfile.TemporaryDirectory() as folder:
        writer = LatentsWriter(Path(folder), 8, torch.randn(2, 3), samples_a_shard)
        written = []
        for shape, tokens, caption in samples:
            frame = FirstFrame(torch.randn(shape), torch.randn(5, 6)).to(dtype) if images else None
            written.append((torch.randn(shape).to(dtype), torch.randn(tokens, 3), frame, caption))
            writer.add(*written[-1][:3], caption=caption, source="a.mp4", frames=5, height=16, width=16)
        writer.close()
        dataset = LatentsDataset(folder)
        assert len(dataset) == len(samples) and torch.equal(dataset.negative_embeds_LD, writer.negative_embeds_LD)
        for index, (latents, embeds, frame, caption) in enumerate(written):
            sample = dataset[index]
            assert torch.equal(sample.latents, latents) and torch.equal(sample.prompt_embeds, embeds) and sample.caption == caption
            if images:
                assert torch.equal(dataset.first_frame(index).latents, frame.latents)
                assert torch.equal(dataset.first_frame(index).embeds, frame.embeds)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**31))
def test_an_epoch_visits_every_sample_and_none_more_often_than_its_bucket_asks_for(counts, batch, epoch, seed):
    numbers = iter(range(sum(counts)))
    buckets = {(size,): [next(numbers) for _ in range(count)] for size, count in enumerate(counts)}
    order = BatchOrder(buckets, batch, Randomness(seed))
    steps = [order(epoch * order.steps_an_epoch + step) for step in range(order.steps_an_epoch)]
    for shape, indices in buckets.items():
        seen = [index for of, some in steps for index in some if of == shape]
        visits = {index: seen.count(index) for index in indices}
        assert set(seen) == set(indices) and max(visits.values()) - min(visits.values()) <= 1
        assert len(seen) == -(-len(indices) // batch) * batch
    sized = SizedOrder(list(buckets), sum(counts), batch, Randomness(seed))
    seen = {index for step in range(-(-sum(counts) // batch)) for index in sized(step)[1]}
    assert seen == set(range(sum(counts)))

"""The attention of a sample that several ranks share is that of the whole sample, and so are its gradients."""

import json

import pytest

from tests.distributed.attention_ranks import LAYOUTS, TOKENS
from tests.distributed.launch import assert_fine, run_ranks


@pytest.fixture(scope="module")
def found():
    results = run_ranks(4, "-m", "tests.distributed.attention_ranks")
    assert_fine(results)
    return json.loads(results[0].stdout.splitlines()[-1])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layout", ["xdit", *(f"{ulysses}x{ring}" for ulysses, ring in LAYOUTS)])
def test_value_and_gradients_are_those_of_the_whole_sample(found, layout, tokens):
    assert found[f"{layout} {tokens}"] == {name: pytest.approx(0, abs=3e-6) for name in ("value", "q", "k", "v")}


@pytest.mark.parametrize("layout", [f"{ulysses}x{ring}" for ulysses, ring in LAYOUTS])
def test_image_to_video_is_diffusers_own_forward(found, layout):
    assert found[f"{layout} image to video"] == {"value": pytest.approx(0, abs=1e-5)}

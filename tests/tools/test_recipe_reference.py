"""docs/recipe.md is what the recipe's own types say, and says of every key what it is."""

import re

from dmd_ds.recipe import REPOSITORY, known_keys
from tools.recipe_reference import reference


def test_the_reference_of_keys_is_what_the_recipes_types_say():
    page = (REPOSITORY / "docs" / "recipe.md").read_text()
    assert page == reference(), "run python tools/recipe_reference.py"
    told = re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| (.*) \|$", page, re.MULTILINE)
    assert {key for key, _ in told} >= set(known_keys()) and [key for key, what in told if not what] == []

"""Studies: which runs they are, what is refused, and the table."""

import json
from pathlib import Path

import pytest

from dmd_ds.errors import UserError
from dmd_ds.recipe import dump_recipe
from tests.distributed.launch import run_ranks
from tests.mini import make_recipe
from tools.study import STUDIES, find_study, is_finished, markdown, read_study


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_study_is_a_recipe_with_a_folder_of_its_own(path, tmp_path):
    study = read_study(find_study(path.stem))
    recipes = [study.recipe_of(name, seed, tmp_path) for name in study.runs for seed in study.seeds]
    assert len({recipe.output_dir for recipe in recipes}) == len(recipes) == len(study.runs) * len(study.seeds)
    assert {recipe.seed for recipe in recipes} == set(study.seeds)
    assert not is_finished(recipes[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [", "study.yaml: not readable as YAML"),
        ("seeds: [0]", "study.yaml: the key runs is missing"),
        ("runs: {a: []}\nprompts: 1", "study.yaml: prompts=1: input should be greater than or equal to 2"),
        ("runs: {a: []}\nseed: 1", "study.yaml: unknown key seed"),
        ("runs: {a: []}\nsizes: [9x64]", "study.yaml: sizes"),
    ],
)
def test_a_study_with_a_mistake_names_file_and_key(tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(find_study(str(tmp_path / "study.yaml")))
    with pytest.raises(UserError, match="'ablaton' is neither a YAML file nor one that ships .*; did you mean 'ablation'"):
        find_study("ablaton")


def test_the_table_has_means_and_how_far_seeds_lie_apart():
    lines = markdown({"whole": [{"frechet": 1.0, "gap_closed": 0.9}, {"frechet": 2.0, "gap_closed": 0.8}], "other": [{"frechet": 3.0}]})
    assert "| whole | 2 | 0.850 ± 0.050 | 1.500 ± 0.500 |" in lines and "| other | 1 | - | 3.000 |" in lines


@pytest.mark.slow
def test_a_study_trains_its_runs_once_and_compares_them_with_the_teacher(tmp_path):
    recipe = make_recipe(tmp_path, max_steps=2, data={"batch_size": 2})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    runs = {"whole": [], "faster": ["generator.lr=1e-2"]}
    study = {"recipe": str(tmp_path / "recipe.yaml"), "seeds": [0, 1], "prompts": 4, "sizes": ["5x32x32"], "runs": runs}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = "tools/study.py", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"
    first, again = (run_ranks(1, *command)[0] for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stdout + again.stdout
    assert first.stdout.count("training ") == 4 and "training " not in again.stdout
    found = json.loads((tmp_path / "out" / "study.json").read_text())["runs"]
    assert {name: len(seeds) for name, seeds in found.items()} == {"whole": 2, "faster": 2}
    columns = {"frechet", "gap_closed", "seconds_trained", "both at 5x32x32", "falls at 5x32x32"}
    assert all(columns <= numbers.keys() for seeds in found.values() for numbers in seeds)
    assert Path(tmp_path / "out" / "table.md").read_text() in first.stdout

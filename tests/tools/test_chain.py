"""Chains: each stage starts from what the one before made, and a mistake is named before the first one runs."""

from pathlib import Path

import pytest
import yaml

from dmd_ds.errors import UserError
from dmd_ds.recipe import dump_recipe
from tests.distributed.launch import run_ranks
from tests.mini import make_recipe
from tools.chain import CHAINS, find_chain, read_chain


@pytest.mark.parametrize("name", sorted(path.stem for path in CHAINS.glob("*.yaml")))
def test_a_shipped_chain_goes_from_guidance_to_rewards_each_from_the_one_before(name, tmp_path):
    steps = read_chain(find_chain(name), tmp_path, "teacher", ["seed=7"])
    assert [step.recipe.stage for step in steps] == ["cfg_distill", "dmd2", "reward"]
    assert [step.recipe.model.path for step in steps] == ["teacher", *(str(step.model) for step in steps[:-1])]
    assert {step.recipe.seed for step in steps} == {7} and len({step.recipe.output_dir for step in steps}) == 3
    assert steps[1].recipe.sampling == steps[2].recipe.sampling


@pytest.mark.parametrize(
    "text, message",
    [
        ("recipe: tiny", "a chain is a list of stages"),
        ("- recipe: tiny\n- recipes: tiny", "stage 2: .*recipe"),
        ("- {recipe: tiny, changes: [generator.rl=1]}", "unknown key generator.rl; did you mean 'generator.lr'"),
    ],
)
def test_a_chain_with_a_mistake_names_it(tmp_path, text, message):
    (tmp_path / "chain.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_chain(find_chain(str(tmp_path / "chain.yaml")), tmp_path, None, [])
    with pytest.raises(UserError, match="chain 'tny' is neither a YAML file nor one that ships .*; did you mean 'tiny'"):
        find_chain("tny")


@pytest.mark.slow
def test_a_chain_runs_from_the_teacher_to_a_rewarded_student_and_again_fast(tmp_path):
    shared = {"max_steps": 1}
    reward = {"rewards": {"tests.distributed.plain_stages:redness": 1.0}}
    recipes = {
        "cfg": make_recipe(tmp_path, stage="cfg_distill", fake_score=None, **shared),
        "dmd2": make_recipe(tmp_path, **shared),
        "reward": make_recipe(tmp_path, stage="reward", fake_score=None, reward=reward, generator={"lora_rank": 2}, **shared),
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump([{"recipe": str(tmp_path / f"{name}.yaml")} for name in recipes]))
    command = "tools/chain.py", str(tmp_path / "chain.yaml"), "--out", str(tmp_path / "out")
    first, again = (run_ranks(1, *command)[0] for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stdout + again.stdout
    assert first.stdout.count("train.py") == 3 and "train.py" not in again.stdout
    last = tmp_path / "out" / "3_reward_model"
    assert len(list((tmp_path / "out").glob("*/report.html"))) == 3
    assert again.stdout.splitlines()[-1] == f"reward: {last}" and "Trained on rewards" in Path(last / "README.md").read_text()

"""Recipes are checked where they enter, and the message helps."""

import pytest
import yaml

from dmd_ds.errors import UserError
from dmd_ds.recipe import dump_recipe, known_keys, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_the_keys_that_others_rely_on_are_known():
    relied_on = {"output_dir", "max_steps", "save_every", "seed", "model.path", "data.path", "parallel.ulysses", "parallel.ring"}
    relied_on |= {"generator.lr", "fake_score.lr", "fake_score.updates_per_generator_update", "sampling.steps"}
    assert relied_on <= set(known_keys())


def test_overrides_reach_nested_keys_and_read_numbers_as_people_write_them():
    recipe = load_recipe("tiny", ["generator.lr=1e-5", "max_steps=7", "sampling.last_sigma=null", "model.path=some/where"])
    assert (recipe.generator.lr, recipe.max_steps, recipe.sampling.last_sigma, recipe.model.path) == (1e-5, 7, None, "some/where")


@pytest.mark.parametrize(
    "override, message",
    [
        ("generator.lrr=1", "unknown key generator.lrr; did you mean 'generator.lr'?"),
        ("max_step=1", "unknown key max_step; did you mean 'max_steps'?"),
        ("generator.lr=-1", "generator.lr=-1: input should be greater than 0"),
        ("generator.lr=fast", "generator.lr='fast': input should be a valid number"),
        ("max_steps=1.5", "max_steps=1.5: input should be a valid integer"),
        ("generator=3", "generator=3: input should be a valid dictionary"),
        ("seed.deep=3", "seed is a value, not a section"),
        ("generator.lora_rank=0", "generator.lora_rank=0: input should be greater than or equal to 1"),
        ("max_steps", "'max_steps' is not of the form key=value"),
        ("sampling.timesteps=[1000, 800]", "sampling.timesteps=[1000, 800]: are 2, but steps=4; leave steps out or let it be that"),
        ("sampling.timesteps=[1000, 900, 900, 20]", "sampling.timesteps=[1000, 900, 900, 20]: must fall, but 900 follows 900"),
        ("sampling.timesteps=[1200, 900, 800, 20]", "sampling.timesteps.0=1200: input should be less than or equal to 1000"),
        ("sampling.timesteps=[1000, 900, 800, 0]", "sampling.timesteps.3=0: input should be greater than 0"),
        ("sampling.timesteps=[]", "sampling.timesteps=[]: tuple should have at least 1 item"),
        ("sampling.grid=unipc", "sampling.grid='unipc': input should be 'stretched' or 'wan'"),
        ("sampling.solver=heun", "sampling.solver='heun': input should be 'sde' or 'ode'"),
        ("rollout.exit=first", "rollout.exit='first': input should be 'random' or 'last'"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


REWARD = ["regression={}", "stage=reward", "fake_score=null", "generator.lora_rank=4", "reward.rewards={a: 1}"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["stage=cfg_distill"], "fake_score: stage=cfg_distill has no use for this section"),
        (["stage=regression", "fake_score=null", "gan.generator_weight=1"], "gan: stage=regression has no use for this section"),
        (["cfg_distill.guidance_max=3"], "cfg_distill: stage=dmd2 has no use for this section"),
        (["fake_score=null"], "the key fake_score is missing"),
        ([*REWARD[:4]], "the key reward.rewards is missing"),
        ([*REWARD, "generator.lora_rank=null"], "generator.lora_rank=None: stage=reward trains an adapter"),
        ([*REWARD, "model.guidance_embedding=true"], "model.guidance_embedding=True: stage=reward trains an adapter alone"),
        ([*REWARD, "reward.steps=5"], "reward.steps=5: are of sampling.steps=4"),
        ([*REWARD, "reward.rewards={a: much}"], "reward.rewards.a"),
        (["stage=regression", "fake_score=null", "regression.steps=2"], "regression.steps=2: of a warm-up of DMD2"),
        (["regression.target=half_step"], "regression.target=half_step: of steps along the velocity, give sampling.solver=ode"),
        (["stage=dmd3"], "stage='dmd3': input should be 'cfg_distill', 'regression', 'dmd2' or 'reward'"),
    ],
)
def test_a_section_that_the_stage_would_pass_over_or_lacks_is_named(overrides, message):
    with pytest.raises(UserError) as error:
        load_recipe("tiny", overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_guidance_range_that_is_none_is_refused():
    with pytest.raises(UserError, match="cfg_distill.guidance_max=2: is below guidance_min=3"):
        load_recipe("tiny_cfg_distill", ["cfg_distill.guidance_min=3", "cfg_distill.guidance_max=2"])


def test_activations_are_offloaded_only_where_they_are_checkpointed():
    assert load_recipe("tiny", ["activation_offload=true"]).activation_offload
    with pytest.raises(UserError, match="activation_offload=True: .*needs activation_checkpointing=true"):
        load_recipe("tiny", ["activation_offload=true", "activation_checkpointing=false"])


def test_a_recipe_that_does_not_exist_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_missing_key_is_named(tmp_path):
    tree = yaml.safe_load(dump_recipe(load_recipe("tiny")))
    del tree["model"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="the key model is missing"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "!!python/object/apply:os.system ['echo hi']"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="r.yaml"):
        load_recipe(str(tmp_path / "r.yaml"))

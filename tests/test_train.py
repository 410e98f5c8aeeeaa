"""The command: which recipe it takes, what it refuses and how."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd_ds import __version__
from dmd_ds.checkpoint import State
from dmd_ds.errors import UserError
from dmd_ds.inputs import check_inputs
from dmd_ds.recipe import PACKAGE, REPOSITORY, dump_recipe, shipped_recipes
from tests.mini import IMAGE_EMBEDS_SHAPE, make_dataset, make_recipe

SECRET = "a-key-that-stays-in-the-environment"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_recipe(folder)
    return folder


def train(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"), SECRET)}
    command = [*launcher, "dmd_ds/train.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)


def test_without_a_recipe_and_an_accelerator_it_is_tiny_and_says_why(tmp_path):
    done = train("--dry-run", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "recipe tiny: no accelerator is there"
    assert "54 samples, latents 16x5x8x8" in done.stdout and "sigmas 1.000 0.965 0.891 0.625 0.000" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_recipes_that_ship_are_listed_and_the_version_is_told():
    listed = train("--list-recipes")
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == shipped_recipes()
    assert "tiny " in listed.stdout and "The embedded world" in listed.stdout
    assert train("--version").stdout == f"dmd_ds {__version__}\n"


def test_the_launcher_with_the_local_hostfile_trains_and_the_same_command_resumes(world):
    recipe = make_recipe(world, output_dir=str(world / "launched"), max_steps=1, data={"batch_size": 1})
    (world / "launched.yaml").write_text(dump_recipe(recipe))
    launcher = (
        str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfiles/local", "--no_ssh_check",
        "--master_addr", "127.0.0.1", "--master_port", "29611",
    )  # fmt: skip
    first = train(str(world / "launched.yaml"), launcher=launcher)
    assert first.returncode == 0, first.stdout + first.stderr
    again = train(str(world / "launched.yaml"), "max_steps=3", launcher=launcher)
    assert again.returncode == 0 and "2 ranks x batch 1; steps 1 to 3" in again.stdout
    lines = [json.loads(line) for line in (world / "launched" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"loss/fake_score", "grad_norm/fake_score", "seconds"} <= line.keys() for line in lines)
    assert ["loss/dm" in line for line in lines] == ["grad_norm/generator" in line for line in lines] == [True, False, True]
    assert [line["step"] for line in map(json.loads, (world / "launched" / "starts.jsonl").read_text().splitlines())] == [0, 1]
    assert (world / "launched" / "logs" / "rank_00001.log").is_file() and "step 3/3" in again.stderr
    written = [path for path in (world / "launched").rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not any(SECRET in text for run in (first, again) for text in (run.stdout, run.stderr))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tinny"], "recipe 'tinny' is neither a YAML file nor one that ships"),
        (["tiny", "generator.rl=1"], f"{PACKAGE}/recipes/tiny.yaml: unknown key generator.rl; did you mean 'generator.lr'?"),
        (["tiny", "model.path=nowhere"], "model.path=nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, arguments, message):
    done = train(*arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and f"error: {message}" in done.stdout + done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def refused(world, message, **changes):
    with pytest.raises(UserError, match=message):
        check_inputs(make_recipe(world, **changes))


def test_inputs_that_do_not_fit_together_are_refused_with_both_numbers(world, tmp_path):
    refused(world, "parallel.ulysses=2", parallel={"ulysses": 2})
    refused(world, "sigma_min=0.9 is not below score.sigma_max=0.5", score={"sigma_min": 0.9, "sigma_max": 0.5})
    refused(world, "gan.sigma_min=0.5 is not below gan.sigma_max=0.5", gan={"sigma_min": 0.5, "sigma_max": 0.5})
    refused(world, r"gan.blocks=\[0, 2\]: there is no block 2, model.path has 2", gan={"blocks": [0, 2]})
    refused(world, "data.sizes=5x30x32: height=30: must be a multiple of 16", data={"sizes": ["5x32x32", "5x30x32"]})
    refused(world, r"data.sizes=\['5x32x32'\]: a GAN, data mode and images", data={"sizes": ["5x32x32"]}, gan={"generator_weight": 1})
    high = {"score": {"above_exit": True}, "sampling": {"timesteps": [1000, 990]}}
    refused(world, "score.sigma_max=0.98 is below 0.990, the second noise level of sampling", **high)
    assert check_inputs(make_recipe(world, **high, rollout={"exit": "last"})).summary().endswith("sigmas 1.000 0.990 0.000, sde")
    channels = make_dataset(tmp_path / "channels", shapes=((3, 2, 4, 4),))
    refused(world, "latents of 3 channels, model.path takes 4", data={"path": str(channels)})
    wordy = make_dataset(tmp_path / "wordy", samples=1, words=600)
    refused(world, "data.path=.*wordy: a prompt of 600 tokens, Wan2.1 takes 512", data={"path": str(wordy)})
    odd = make_dataset(tmp_path / "odd", shapes=((4, 2, 5, 4),))
    refused(world, r"latents \[2, 5, 4\] do not divide into patches \[1, 2, 2\]", data={"path": str(odd)})


def test_images_in_the_data_and_a_model_without_and_the_reverse_are_refused(world, mini_image_model, tmp_path):
    data = make_dataset(tmp_path / "images", image_embeds_shape=IMAGE_EMBEDS_SHAPE)
    other = make_dataset(tmp_path / "other", image_embeds_shape=(5, 21))
    model = {"path": str(mini_image_model)}
    refused(world, "data.path=.*: made for image to video, model.path=.* takes text alone", data={"path": str(data)})
    refused(world, "data.path=.*: made for text to video, model.path=.* takes images too", model=model)
    refused(world, "data.path=.*: images of width 21, model.path=.* takes 20", model=model, data={"path": str(other)})
    assert "image to video, 2 layers" in check_inputs(make_recipe(world, model=model, data={"path": str(data)})).summary()


def test_a_ds_config_that_is_no_json_or_not_stage_3_names_file_and_line(world, tmp_path):
    (tmp_path / "broken.json").write_text('{\n "zero_optimization": \n')
    (tmp_path / "stage2.json").write_text('{"zero_optimization": {"stage": 2}}')
    refused(world, r"broken.json:3: not readable as JSON", generator={"ds_config": str(tmp_path / "broken.json")})
    refused(world, r"stage2.json: zero_optimization.stage=2", fake_score={"ds_config": str(tmp_path / "stage2.json")})
    refused(world, r"generator.ds_config=gone.json: no such file", generator={"ds_config": "gone.json"})


def test_a_latest_that_names_a_checkpoint_that_is_gone_is_refused(world, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_000009")
    refused(world, "names step_000009, which is not a whole checkpoint", output_dir=str(tmp_path / "run"))


def test_a_resumed_run_keeps_its_recipe_but_for_how_long_and_where_it_runs(world, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_000009"
    folder.mkdir(parents=True)
    state = State(step=9, score=None, world_size=8, global_batch_size=2, video={}, versions={})
    (folder / "state.json").write_text(state.model_dump_json())
    (folder / "recipe.yaml").write_text(dump_recipe(make_recipe(world)))
    (folder.parent / "latest").write_text("step_000009")
    run = {"output_dir": str(tmp_path / "run")}
    assert check_inputs(make_recipe(world, max_steps=20, data={"batch_size": 1, "accumulation": 2}, **run)).first_step == 9
    refused(world, r"seed=1: the run in .* was started with 0", seed=1, **run)
    refused(world, r"fake_score.lora_rank=8: the run in .* was started with 4", fake_score={"lora_rank": 8}, **run)
    refused(world, "data.batch_size=1 on 1 ranks is a global batch of 1, the run in .* has 2", data={"batch_size": 1}, **run)
    (folder / "state.json").write_text('{"step": "nine"}')
    refused(world, "state.json: step='nine'", **run)


def test_the_entry_is_short_enough_to_read():
    assert len((REPOSITORY / "dmd_ds" / "train.py").read_text().splitlines()) <= 60

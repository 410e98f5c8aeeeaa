"""Batch inference: a file a prompt and seed, nothing made twice, nothing outside the folder."""

import json
import subprocess
import sys

import pytest
import torch

from dmd_ds.data.video import read_video
from dmd_ds.errors import UserError
from dmd_ds.generation import Settings, VideoModel, read_settings, write_settings
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import REPOSITORY, Parallel, Sampling
from inference.generate import Job, generate, read_jobs


@pytest.fixture(scope="module")
def model(mini_model):
    return VideoModel(str(mini_model), torch.device("cpu"))


@pytest.fixture(scope="module")
def settings(model):
    return model.settings.changed(steps=2, guidance=2.0, frames=5, height=32, width=32, fps=8)


@pytest.fixture(scope="module")
def alone():
    with joined(Parallel()) as mesh:
        yield mesh


JOBS = [Job("a red circle", 1), Job("a red circle", 2), Job("../../a blue/square", 3), Job("", 4)]


def test_every_prompt_gets_a_file_within_the_folder(model, alone, settings, tmp_path):
    assert generate(model, "mark", JOBS, tmp_path / "out", settings, batch_size=3, negative_prompt="", mesh=alone) == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [(job.prompt, job.seed) for job in JOBS]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {line["file"] for line in lines} | {"manifest.jsonl", "contact_sheet.png"} and len(files) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_video(tmp_path / "out" / lines[0]["file"], 5, 32, 32, 8).shape == (5, 32, 32, 3)


def test_a_second_run_makes_only_what_is_missing(model, alone, settings, tmp_path):
    generate(model, "mark", JOBS, tmp_path, settings, batch_size=4, negative_prompt="", mesh=alone)
    files = sorted(tmp_path.glob("*.mp4"))
    files[1].unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert generate(model, "mark", JOBS, tmp_path, settings, batch_size=4, negative_prompt="", mesh=alone) == 1
    assert files[1].exists() and all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_batch(model, settings):
    prompts, seeds = ["a red circle", "a blue square"], [1, 2]
    together = model.latents(prompts, seeds, settings)
    alone = torch.cat([model.latents([prompt], [seed], settings) for prompt, seed in zip(prompts, seeds, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.latents(prompts[:1], [9], settings), alone[:1])


def test_other_settings_get_other_names(settings):
    job = Job("a", 1)
    names = {job.name(0, settings, "m", ""), job.name(0, settings.changed(steps=3), "m", ""), job.name(0, settings, "n", "")}
    assert len(names | {Job("A", 1).name(0, settings, "m", ""), job.name(0, settings, "m", "blurry")}) == 5


@pytest.mark.parametrize("steps, told", [(1, [1000]), (2, [1000, 800]), (4, [1000, 900, 800, 400])])
def test_a_student_samples_in_as_many_steps_as_it_is_asked_for(model, settings, steps, told):
    few_step = Sampling(timesteps=(1000, 800), solver="ode")
    student = settings.model_copy(update={"steps": 2, "guidance": 1.0, "few_step": few_step}).changed(steps=steps)
    seen = []
    hook = model.denoiser.register_forward_hook(lambda module, inputs, output: seen.append(round(1000 * float(inputs[1][0]))))
    model.latents(["a red circle"], [0], student)
    hook.remove()
    assert seen == told and model.evaluations(student) == steps


def test_a_students_settings_that_contradict_each_other_are_refused(tmp_path):
    student = Settings(steps=4, few_step=Sampling(grid="wan", solver="ode"))
    write_settings(tmp_path, student)
    assert read_settings(tmp_path) == student
    with pytest.raises(UserError, match="steps=0: input should be greater"):
        student.changed(steps=0)
    with pytest.raises(UserError, match="steps=4: the student was trained at 1 step"):
        Settings(steps=1, few_step=Sampling(steps=1, last_sigma=None)).changed(steps=4)
    file = tmp_path / "sampling.json"
    file.write_text(file.read_text().replace('"steps": 4', '"steps": 3', 1))
    with pytest.raises(UserError, match="sampling.json: few_step=.*: is of 4 steps, but steps=3") as error:
        read_settings(tmp_path)
    assert "\n" not in str(error.value)


def test_prompts_are_lines_of_text_or_of_json(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "seed": 70}\n')
    assert read_jobs(tmp_path / "p.txt", 5) == [Job("one", 5), Job("two", 6)]
    assert read_jobs(tmp_path / "p.jsonl", 5) == [Job("one", 5), Job("two", 70)]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.jsonl", '{"prompt": 3}', r"p.jsonl:1: a line reads"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "seed": "x"}', r"p.jsonl:2: seed='x'"),
        ("p.jsonl", "one", r"p.jsonl:1: not readable as JSON"),
    ],
)
def test_a_bad_prompt_file_names_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_jobs(tmp_path / name, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--frames", "6"], "frames=6: must be 4n + 1, the nearest is 5"),
        (["--height", "40"], "height=40: must be a multiple of 16"),
        (["--steps", "0"], "steps=0: input should be greater than or equal to 1"),
        (["--model", "nowhere"], "model.path=nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mini_model, tmp_path, arguments, message):
    (tmp_path / "p.txt").write_text("a red circle\n")
    files = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path)]
    command = [sys.executable, "inference/generate.py", "--model", str(mini_model), *files]
    done = subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {message}" in done.stderr and "Traceback" not in done.stderr

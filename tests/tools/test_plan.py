"""The planner's command line: a table, a file of numbers, and one line for a mistake."""

import json
import re
import sys

import pytest

from tools import plan


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        code = 0
        try:
            plan.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_recipe_without_its_weights_is_planned(command, tmp_path):
    file = tmp_path / "deep" / "plan.json"
    code, out, _ = command("t2v_14b_480p", "parallel.ulysses=8", "--gpus", "8", "--json", str(file))
    assert code == 0 and "32,760 tokens" in out and "generator: Adam moments" in out and "EMA of the generator" in out
    found = json.loads(file.read_text())
    assert found["own"]["tokens"] == 32_760
    added = {phase: sum(terms.values()) for phase, terms in found["own"]["phases_bytes"].items()}
    assert found["own"]["peak_bytes"] == pytest.approx(sum(found["own"]["always_bytes"].values()) + max(added.values()))
    assert f"peak {found['own']['peak_bytes'] / 1e9:.2f} GB" in out
    assert found["cheapest"]["generator trained whole"]["peak_bytes"] <= 80e9


def test_the_model_on_disk_is_read_and_the_name_says_the_size_of_the_video(command, tmp_path):
    _, out, _ = command("tiny", "--gpus", "2", "--frames", "17", "--height", "64", "--width", "64")
    assert "latents 5x8x8, 80 tokens" in out
    recipe = tmp_path / "my_14b_720p.yaml"
    recipe.write_text("output_dir: o\nmax_steps: 1\nmodel: {path: nowhere}\ndata: {path: d}\ngenerator: {lr: 1}\nfake_score: {lr: 1}\n")
    _, out, _ = command(str(recipe), "--gpus", "2")
    assert "14.29 B weights" in out and "75,600 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["t2v_14b_480"], "did you mean 't2v_14b_480p'"),
        (["t2v_14b_480p", "parallel.ulysses=5"], "does not divide --gpus 8"),
        (["t2v_14b_480p", "parallel.ring=16"], "does not divide --gpus 8"),
        (["tiny", "model.path=nowhere/5B"], "names a published size"),
        (["t2v_14b_480p", "generator.lr=fast"], "generator.lr"),
        (["t2v_14b_480p_reward"], "t2v_14b_480p_reward: stage=reward; the memory of DMD2 alone is planned"),
        (["t2v_14b_480p", "--frames", "80"], "4 n \\+ 1"),
        (["t2v_14b_480p", "--mfu", "0"], "--mfu"),
        (["t2v_14b_480p", "parallel.ulysses=8", "--gpus-per-node", "4"], "--gpus-per-node"),
        (["t2v_14b_480p", "generator.ds_config=nowhere.json"], "no such file"),
        (["tiny", "fake_score.ds_config=requirements.txt"], "requirements.txt:1: not readable as JSON"),
    ],
)
def test_a_mistake_is_one_line(command, arguments, says):
    code, _, err = command(*arguments, "--gpus", "8")
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert re.search(says, err)

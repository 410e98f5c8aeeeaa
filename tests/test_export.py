"""A trained generator in others' formats is the same generator, and what a LoRA leaves of it is told."""

import subprocess
import sys

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from dmd_ds.errors import UserError
from dmd_ds.export import find_student, to_comfyui, to_diffusers, to_wan, whole_folder
from dmd_ds.lora import low_rank, to_lora
from dmd_ds.recipe import REPOSITORY
from dmd_ds.wan.original import to_original
from dmd_ds.wan.weights import stored_tensors
from tools.convert_wan import convert


@pytest.fixture(scope="module")
def student(run):
    return find_student(run)


@pytest.fixture(scope="module")
def trained(student):
    return {name: student.read(name) for name in student.specs}


def test_the_original_format_comes_back_as_the_trained_weights(student, trained, tmp_path):
    to_wan(student, tmp_path / "wan")
    convert(tmp_path / "wan", tmp_path / "diffusers")
    back = stored_tensors(tmp_path / "diffusers" / "transformer")
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[name].read(), weight) for name, weight in trained.items())
    assert (tmp_path / "wan" / "README.md").is_file()


def test_comfyui_gets_one_file_of_original_names(student, trained, tmp_path):
    to_comfyui(student, tmp_path / "my-student")
    tensors = load_file(tmp_path / "my-student" / "my-student.safetensors")
    assert {"blocks.0.self_attn.q.weight", "head.modulation", "time_projection.1.bias"} <= tensors.keys()
    assert tensors.keys() == {to_original(name) for name in trained}
    assert all(torch.equal(tensors[to_original(name)], weight) for name, weight in trained.items())


def test_a_lora_of_full_rank_is_all_that_changed_in_the_matrices(student, run, trained, tmp_path):
    assert to_lora(student, tmp_path / "lora", rank=48).matrices < 1e-5
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    base = WanTransformer3DModel.from_pretrained(run.parent / "model" / "transformer").state_dict()
    for name in ("blocks.1.attn2.to_out.0", "blocks.0.ffn.net.2"):
        key = f"diffusion_model.{to_original(name + '.weight').removesuffix('.weight')}"
        A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        restored = base[f"{name}.weight"] + float(tensors[f"{key}.alpha"]) / len(A) * B @ A
        torch.testing.assert_close(restored, trained[f"{name}.weight"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(base[f"{name}.bias"] + tensors[f"{key}.diff_b"], trained[f"{name}.bias"], atol=1e-6, rtol=1e-5)


def test_less_rank_leaves_more_and_says_so(student, tmp_path):
    errors = [to_lora(student, tmp_path / f"rank{rank}", rank).matrices for rank in (1, 4, 16)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    assert f"leaves {errors[1]:.1%} of the norm" in (tmp_path / "rank4" / "README.md").read_text()


def test_stock_diffusers_takes_the_lora_and_comes_near_the_student(student, run, trained, tmp_path):
    to_lora(student, tmp_path / "lora", rank=48)
    pipeline = WanPipeline.from_pretrained(run.parent / "model")
    x, text, timestep = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 512, 16), torch.tensor([600.0])

    def velocity(transformer):
        with torch.no_grad():
            return transformer(x, timestep, text, return_dict=False)[0]

    before = velocity(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="lora.safetensors")
    after = velocity(pipeline.transformer)
    whole = WanTransformer3DModel.from_pretrained(run.parent / "model" / "transformer")
    whole.load_state_dict(trained)
    adapted = WanTransformer3DModel.from_pretrained(run.parent / "model" / "transformer")
    adapted.load_state_dict({name: weight for name, weight in trained.items() if name.startswith("blocks.")}, strict=False)
    expected = velocity(whole)
    assert (after - expected).norm() < (before - expected).norm()
    assert (after - velocity(adapted)).norm() < 0.2 * (before - velocity(adapted)).norm()  # norms and modulation stay the base's


@pytest.mark.parametrize("shape", [(40, 30), (2100, 2060)])
def test_low_rank_finds_what_there_is(shape):
    torch.manual_seed(0)
    exact = torch.randn(shape[0], 5) @ torch.randn(5, shape[1])
    A, B = low_rank(exact, 5)
    assert A.shape == (5, shape[1]) and B.shape == (shape[0], 5)
    torch.testing.assert_close(B @ A, exact, atol=1e-3, rtol=1e-3)


def test_a_folder_that_cannot_be_filled_is_not_there(tmp_path):
    with pytest.raises(UserError, match="out: cannot be written: No space left on device"), whole_folder(tmp_path / "out") as folder:
        (folder / "some").write_text("file")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists already"), whole_folder(tmp_path):
        pass


@pytest.mark.parametrize("export", [to_diffusers, to_wan, to_comfyui, to_lora])
def test_a_disk_that_fills_is_one_line_and_nothing_is_left(student, tmp_path, full_disk, export):
    with full_disk(), pytest.raises(UserError, match=r"out: .*cannot be written: .*File too large"):
        export(student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_makes_every_format(run, tmp_path):
    for kind in ("diffusers", "wan", "comfyui", "lora"):
        command = [sys.executable, "tools/export.py", str(run), str(tmp_path / kind), "--format", kind, "--rank", "2"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith(f"{tmp_path / kind}\n"), done.stderr
        assert ("left over: " in done.stdout) == (kind == "lora")

"""Original Wan2.1 folders and diffusers' turn into each other, tensor for tensor, and guidance folds into a bias."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from dmd_ds.errors import UserError
from dmd_ds.recipe import REPOSITORY
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.guidance import add_guidance_embedding, fresh_weights
from dmd_ds.wan.tensors import stored_tensors
from tools.convert_wan import convert

DIM, FFN, TEXT, FREQ, IMAGE, LAYERS, HEADS = 24, 40, 16, 32, 20, 2, 2


def original_tensors(kind: str) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the published checkpoints, written out here and not taken from the project's tables."""
    channels = 36 if kind == "i2v" else 16
    shapes = {
        "patch_embedding": (DIM, channels, 1, 2, 2), "text_embedding.0": (DIM, TEXT), "text_embedding.2": (DIM, DIM),
        "time_embedding.0": (DIM, FREQ), "time_embedding.2": (DIM, DIM), "time_projection.1": (6 * DIM, DIM), "head.head": (64, DIM),
    }  # fmt: skip
    for n in range(LAYERS):
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{n}.{attention}.{part}": (DIM, DIM) for part in "qkvo"}
        shapes |= {f"blocks.{n}.ffn.0": (FFN, DIM), f"blocks.{n}.ffn.2": (DIM, FFN)}
        if kind == "i2v":
            shapes |= {f"blocks.{n}.cross_attn.{part}": (DIM, DIM) for part in ("k_img", "v_img")}
    if kind == "i2v":
        shapes |= {"img_emb.proj.1": (IMAGE, IMAGE), "img_emb.proj.3": (DIM, IMAGE)}
    if kind == "guidance":
        shapes |= {"guidance_embedding.0": (DIM, FREQ), "guidance_embedding.2": (DIM, DIM)}
    draw = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / math.sqrt(math.prod(shape[1:]) or 1)

    tensors = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": random(shape[0]) for name, shape in shapes.items()}
    norms = [f"blocks.{n}.{a}_attn.norm_{part}.weight" for n in range(LAYERS) for a in ("self", "cross") for part in "qk"]
    norms += [f"blocks.{n}.norm3.{part}" for n in range(LAYERS) for part in ("weight", "bias")]
    if kind == "i2v":
        norms += [f"blocks.{n}.cross_attn.norm_k_img.weight" for n in range(LAYERS)]
        tensors |= {f"img_emb.proj.0.{part}": random(IMAGE) for part in ("weight", "bias")}
        norms += ["img_emb.proj.4.weight", "img_emb.proj.4.bias"]
    tensors |= {name: random(DIM) for name in norms}
    tensors |= {f"blocks.{n}.modulation": random(1, 6, DIM) for n in range(LAYERS)} | {"head.modulation": random(1, 2, DIM)}
    return tensors


@pytest.fixture(params=["t2v", "i2v", "guidance"])
def kind(request):
    return request.param


def make_original(folder, kind: str, files: int = 2):
    """An original folder of several files, whose config.json leaves out what the published one does."""
    folder.mkdir()
    tensors = original_tensors(kind)
    tensors = {name: tensor.bfloat16() if "ffn" in name else tensor for name, tensor in tensors.items()}  # types are mixed there
    names = sorted(tensors)
    weight_map = {}
    for number in range(files):
        part = {name: tensors[name] for name in names[number::files]}
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"_class_name": "WanModel", "model_type": kind, "dim": DIM, "eps": 1e-06, "num_heads": HEADS, "num_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_there_and_back_every_tensor_is_the_same(tmp_path, kind):
    tensors = make_original(tmp_path / "original", kind)
    convert(tmp_path / "original", tmp_path / "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "back")
    back = stored_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name].read(), tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "model_type")} == {
        "dim": DIM, "num_heads": HEADS, "num_layers": LAYERS, "ffn_dim": FFN, "freq_dim": FREQ, "text_len": 512,
        "model_type": "i2v" if kind == "i2v" else "t2v",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_names_are_those_that_diffusers_gives_and_its_class_loads_them(tmp_path, kind):
    tensors = make_original(tmp_path / "original", kind)
    convert(tmp_path / "original", tmp_path / "diffusers")
    expected = convert_wan_transformer_to_diffusers(dict(tensors))
    found = stored_tensors(tmp_path / "diffusers" / "transformer")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())
    model, report = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer", output_loading_info=True)
    assert not any(report.values()), report
    assert (model.config.in_channels, model.config.image_dim) == ((36, IMAGE) if kind == "i2v" else (16, None))


def test_folded_guidance_is_the_embedding_at_that_guidance(tmp_path):
    make_original(tmp_path / "original", "guidance")
    convert(tmp_path / "original", tmp_path / "embedded")
    convert(tmp_path / "original", tmp_path / "folded", guidance=5.0)
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "folded" / "transformer", torch_dtype=torch.float32)
    embedded = add_guidance_embedding(WanTransformer3DModel.from_config(stock.config))
    stored = stored_tensors(tmp_path / "embedded" / "transformer")
    embedded.load_state_dict({name: tensor.read().float() for name, tensor in stored.items()})
    x, text, sigma = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 512, TEXT), torch.tensor([0.3, 0.9])
    denoiser = WanDenoiser(embedded)
    expected = denoiser(x, sigma, text, guidance_B=torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(stock(x, 1000 * sigma, text, return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)
    assert (denoiser(x, sigma, text, guidance_B=torch.tensor([1.0, 1.0])) - expected).abs().max() > 1e-3
    convert(tmp_path / "folded", tmp_path / "wan")
    assert not any("guidance" in name for name in stored_tensors(tmp_path / "wan"))


def test_a_fresh_embedding_changes_nothing_and_can_learn(tmp_path):
    make_original(tmp_path / "original", "t2v")
    convert(tmp_path / "original", tmp_path / "diffusers")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer", torch_dtype=torch.float32)
    x, text, sigma = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 512, TEXT), torch.tensor([0.3, 0.9])
    expected = WanDenoiser(stock)(x, sigma, text)
    add_guidance_embedding(stock)
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    stock.load_state_dict(fresh_weights(shapes, seed=0), strict=False)
    out = WanDenoiser(stock)(x, sigma, text, guidance_B=torch.tensor([3.0, 7.0]))
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert stock.condition_embedder.guidance_embedder.linear_2.weight.grad.abs().max() > 0


def change(folder, number: int, edit) -> None:
    file = folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def strange(folder):
    change(folder, 1, lambda tensors: tensors.update({"blocks.0.self_attn.z.weight": torch.zeros(1)}))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["blocks.0.self_attn.z.weight"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(tree))


def without_a_shard(folder):
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def truncated(folder):
    file = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def misshapen(folder):
    change(folder, 1, lambda tensors: tensors.update({name: torch.zeros(3) for name in tensors if name.endswith("ffn.0.bias")}))


def other_model(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    save_file({"conv_in.weight": torch.zeros(3)}, folder / "diffusion_pytorch_model.safetensors")


def without_weight_map(folder):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def wrong_heads(folder):
    (folder / "config.json").write_text(json.dumps({"num_heads": 5}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (strange, "00001-of-00002.safetensors: blocks.0.self_attn.z.weight is no tensor of a Wan2.1 transformer"),
        (without_a_shard, "00002-of-00002.safetensors is missing, though"),
        (truncated, "00002-of-00002.safetensors: not readable as safetensors"),
        (without_weight_map, "index.json: the key weight_map is missing"),
        (misshapen, r"ffn.net.0.proj.bias is \[3\], the configuration asks for \[40\]"),
        (other_model, "conv_in.weight is no tensor of a Wan2.1 transformer"),
        (wrong_heads, "num_heads=5 does not divide the width 24"),
    ],
)
def test_a_folder_that_is_no_whole_wan_is_refused_and_nothing_left(tmp_path, spoil, message):
    make_original(tmp_path / "original", "t2v")
    spoil(tmp_path / "original")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "original", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_a_disk_that_fills_is_one_line_and_nothing_is_left(tmp_path, kind, full_disk):
    make_original(tmp_path / "original", kind)
    with full_disk(), pytest.raises(UserError, match="out: cannot be written: File too large"):
        convert(tmp_path / "original", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_what_cannot_be_folded_or_written_is_one_line(tmp_path):
    make_original(tmp_path / "original", "t2v")
    with pytest.raises(UserError, match="has no guidance embedding to fold"):
        convert(tmp_path / "original", tmp_path / "out", guidance=5.0)
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "original", tmp_path / "original")
    command = [sys.executable, "tools/convert_wan.py", str(tmp_path / "original"), "/proc/here/out"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "error: /proc/here/out: cannot be written" in done.stderr and "Traceback" not in done.stderr

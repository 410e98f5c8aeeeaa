"""Weights come in whole or not at all, and go out as files that safetensors reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_ds.errors import UserError
from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.image import load_image_encoder
from dmd_ds.wan.tensors import Spec, save_weights, stored_tensors
from dmd_ds.wan.text import load_text_encoder
from dmd_ds.wan.weights import find_model, load_weights, renew_buffers, transformer_config
from tests.mini import IMAGE_TRANSFORMER, TRANSFORMER, make_transformer


def sharded(seed: int, config: dict = TRANSFORMER):
    """A transformer whose parameters look as under ZeRO-3 on one rank."""
    module = make_transformer(seed, config)
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape
        parameter.ds_tensor = torch.zeros(parameter.numel())
    return module


def whole(parameter, tensor):
    return tensor.reshape(-1)


@pytest.fixture
def model(mini_model, tmp_path):
    return shutil.copytree(mini_model, tmp_path / "model")


@pytest.fixture
def image_model(mini_image_model, tmp_path):
    return shutil.copytree(mini_image_model, tmp_path / "image_model")


def change(model, edit) -> None:
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_every_tensor_of_the_folder_lands_in_its_parameter(model):
    module = sharded(seed=5)
    load_weights(module, model, whole, fresh={})
    stored = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.ds_tensor, stored[name].reshape(-1)), name


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda tensors: tensors.pop("proj_out.bias"), "1 missing tensors, the first is proj_out.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 unknown tensors, the first is extra"),
        (lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias is \[3\], the configuration asks for \[16\]"),
    ],
)
def test_a_folder_that_does_not_fit_names_the_tensor(model, edit, message):
    change(model, edit)
    with pytest.raises(UserError, match=message):
        load_weights(sharded(0), model, whole, fresh={})


def test_a_truncated_or_missing_file_is_named(model):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: not readable"):
        stored_tensors(model / "transformer")
    file.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        stored_tensors(model / "transformer")


def test_a_folder_without_a_part_or_of_another_model_is_refused(model):
    shutil.rmtree(model / "vae")
    with pytest.raises(UserError, match="vae/config.json is missing"):
        find_model(str(model))
    (model / "transformer" / "config.json").write_text(json.dumps({"_class_name": "UNet"}))
    with pytest.raises(UserError, match="'UNet' is no WanTransformer3DModel"):
        transformer_config(model)


def test_a_configuration_that_lacks_a_key_names_file_and_key(model):
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["out_channels"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformer/config.json: the key out_channels is missing"):
        transformer_config(model)


def test_an_image_to_video_folder_is_read_and_what_no_model_uses_passed_over(image_model):
    stored = load_file(image_model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any("norm_added_q" in name for name in stored)
    module = sharded(5, IMAGE_TRANSFORMER)
    load_weights(module, image_model, whole, fresh={})
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.ds_tensor, stored[name].reshape(-1)), name


def test_an_image_to_video_folder_needs_its_image_encoder(image_model):
    assert find_model(str(image_model)) == image_model
    (image_model / "image_processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="image_processor/preprocessor_config.json is missing"):
        find_model(str(image_model))
    shutil.rmtree(image_model / "image_encoder")
    with pytest.raises(UserError, match="image_encoder/config.json is missing"):
        find_model(str(image_model))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_dim": None}, "in_channels=12, a Wan2.1 text-to-video model of 4 latent channels has 4"),
        ({"in_channels": 8}, "in_channels=8, a Wan2.1 image-to-video model of 4 latent channels has 12"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len=514, a first-and-last-frame model"),
    ],
)
def test_other_models_of_the_family_are_refused(image_model, change, message):
    file = image_model / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        transformer_config(image_model)


def test_the_rotary_tables_are_made_again_exactly():
    module = make_transformer()
    expected = module.rope.freqs_cos.clone()
    module.rope.freqs_cos.data = expected.bfloat16().float()
    renew_buffers(module)
    assert torch.equal(module.rope.freqs_cos, expected) and module.config.num_layers == TRANSFORMER["num_layers"]


@pytest.mark.parametrize("most, files", [(10**9, 1), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_weights_are_read_back_by_safetensors(tmp_path, most, files, dtype):
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(100), "scalar": torch.randn(()), "c": torch.randn(2, 2, 2)}
    specs = {name: Spec(tuple(t.shape), dtype) for name, t in tensors.items()}
    save_weights(tmp_path, specs, tensors.__getitem__, most * dtype.itemsize)
    found = stored_tensors(tmp_path)
    assert found.keys() == tensors.keys() and len({tensor.file for tensor in found.values()}) == files
    for name, tensor in found.items():
        assert torch.equal(load_file(tensor.file)[name], tensors[name].to(dtype)) and torch.equal(tensor.read(), tensors[name].to(dtype))
        assert (tensor.shape, tensor.dtype) == (tuple(tensors[name].shape), dtype)


@pytest.mark.parametrize(
    "file, key, said, message",
    [
        ("transformer/config.json", "num_layers", 200, "num_layers=200, the tensors beside it are of 2"),
        ("transformer/config.json", "ffn_dim", 10**6, "ffn_dim=1000000, the tensors beside it are of 48"),
        ("transformer/config.json", "num_layers", 10**9, "num_layers=1000000000: input should be less than or equal to 256"),
        ("text_encoder/config.json", "num_layers", 200, "num_layers=200, the tensors beside it are of 1 layers"),
        ("text_encoder/config.json", "d_model", "wide", "d_model='wide': input should be a valid integer"),
        ("vae/config.json", "z_dim", 5, "latents_mean and latents_std are 4 and 4 numbers, z_dim=5 has as many channels"),
        ("vae/config.json", "is_residual", True, "is_residual=True: input should be False"),
        ("image_encoder/config.json", "num_hidden_layers", 200, "num_hidden_layers=200, the tensors beside it are of 3 layers"),
        ("image_encoder/config.json", "num_attention_heads", 3, "num_attention_heads=3 does not divide hidden_size=20"),
        ("image_processor/preprocessor_config.json", "resample", 99, "resample=99: input should be"),
    ],
)
def test_a_configuration_that_is_not_that_of_its_tensors_is_refused_before_anything_is_built(image_model, file, key, said, message):
    path = image_model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: said}))
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=f"{file}: {message}"):
        transformer_config(image_model)
        load_text_encoder(image_model, cpu)
        load_autoencoder(image_model, cpu)
        load_image_encoder(image_model, cpu)

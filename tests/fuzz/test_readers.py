"""Whatever a file holds, its reader reads it or says in one line what is wrong: a thousand damaged files and more for each."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from dmd_ds.data import moving_shapes
from dmd_ds.data.latents import LatentsDataset
from dmd_ds.data.video import VideoSize, best_size, read_image, read_video, size_of_film, write_video
from dmd_ds.errors import UserError
from dmd_ds.generation import Settings, load_scheduler, read_settings
from dmd_ds.parallel.engine import complete_ds_config, read_ds_config
from dmd_ds.parallel.hosts import read_hostfile
from dmd_ds.planner.sizes import PUBLISHED, Zero
from dmd_ds.recipe import REPOSITORY, Data, Generator, dump_recipe, load_recipe
from dmd_ds.sampler import few_step_schedule
from dmd_ds.vbench import read_prompts, wanted
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.tensors import INDEX, Spec, read_pickle, save_weights, stored_tensors
from dmd_ds.wan.text import load_tokenizer
from dmd_ds.wan.weights import find_model, transformer_config, transformer_tensors, whole_transformer
from inference.generate import read_jobs, write_manifest
from tests.fuzz.mutate import damaged_bytes, damaged_json, damaged_lines, damaged_safetensors
from tests.mini import make_dataset, make_parts
from tests.wan.test_original_folder import clip_tensors, text_tensors, vae_name
from tools.convert_wan import convert
from tools.encode_videos import list_clips
from tools.study import read_study

INPUTS = 1000
CPU = torch.device("cpu")
KINDS = {".json": damaged_json, ".jsonl": damaged_lines, ".safetensors": damaged_safetensors, ".yaml": damaged_json}


def fuzz(files: list[Path], read: Callable[[], object], inputs: int = INPUTS) -> None:
    """Damages one file after the other, each by its kind, and puts it right again; only `UserError` may come out."""
    rng, whole = random.Random(0), {file: file.read_bytes() for file in files}
    refused = 0
    for number in range(inputs):
        file = files[number % len(files)]
        data = KINDS.get(file.suffix, damaged_bytes)(whole[file], rng)
        file.unlink()  # what was mapped of it stays as it was
        file.write_bytes(data)
        try:
            read()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1100
        except Exception as error:
            raise AssertionError(f"input {number}, {file.name}: {error!r}, of {data[:2000]!r}") from error
        file.write_bytes(whole[file])
    assert refused > inputs / 20  # the damage is felt
    read()


# ---- recipes and what they name ---------------------------------------------------------------------------------------


def small_recipe(folder: Path) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "model": {"path": "tiny-wan"},
        "data": {"path": "tiny-latents", "sizes": ["5x32x32"]},
        "generator": {"lr": 1e-3, "betas": [0.0, 0.9], "ema_decay": 0.5},
        "fake_score": {"lr": 1e-2, "lora_rank": 4},
        "gan": {"blocks": [0, 1]},
        "sampling": {"timesteps": [1000, 800], "solver": "ode"},
    }


def test_recipes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe(tmp_path)))  # JSON is YAML

    def read():
        recipe = load_recipe(str(tmp_path / "recipe.yaml"))
        assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe and dump_recipe(recipe)
        few_step_schedule(recipe.sampling)
        for size in recipe.data.sizes or ():
            VideoSize.parse(size)

    fuzz([tmp_path / "recipe.yaml"], read)


def test_recipes_in_blocks(tmp_path):
    (tmp_path / "recipe.yml").write_text("# a run\noutput_dir: out\nmax_steps: 4\nmodel: {path: m}\ndata:\n  path: d\n  batch_size: 2\n"
                                         "generator:\n  lr: 1.0e-5\nfake_score: {lr: 1e-5}  # YAML reads text\n")  # fmt: skip
    fuzz([tmp_path / "recipe.yml"], lambda: load_recipe(str(tmp_path / "recipe.yml"), ["fake_score.lr=1e-5"]))


def test_overrides(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe(tmp_path)))
    (tmp_path / "override.txt").write_text("sampling.timesteps=[1000, 800]")

    def read():
        load_recipe(str(tmp_path / "recipe.yaml"), [(tmp_path / "override.txt").read_bytes().decode(errors="surrogateescape")])

    fuzz([tmp_path / "override.txt"], read)


def test_names_of_recipes_and_folders():
    rng, finders = random.Random(0), (load_recipe, find_model, LatentsDataset, lambda path: read_ds_config("generator.ds_config", path))
    for number in range(INPUTS):
        name = damaged_bytes(b"some/where.yaml", rng).decode(errors="surrogateescape")
        with pytest.raises(UserError) as error:
            finders[number % len(finders)](name)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["zero3_parameter_offload", "zero3_bf16_states"])
def test_deepspeed_json(tmp_path, name):
    file = Path(shutil.copy(REPOSITORY / "ds_configs" / f"{name}.json", tmp_path))

    def read():
        config = read_ds_config("generator.ds_config", str(file))
        assert complete_ds_config(config, Generator(lr=1e-5), Data(path="none"), PUBLISHED["1.3b"])["optimizer"]["params"]["lr"] == 1e-5
        Zero.from_ds_config(config, PUBLISHED["1.3b"])

    fuzz([file], read)


def test_hostfiles(tmp_path):
    (tmp_path / "hostfile").write_text("# two\nworker-1 slots=8\nworker-2 slots=8\n\n")
    fuzz([tmp_path / "hostfile"], lambda: read_hostfile(tmp_path / "hostfile"))


def test_studies(tmp_path):
    study = {"recipe": "tiny", "seeds": [0, 1], "prompts": 4, "common": ["max_steps=2"], "runs": {"whole": [], "other": ["seed=3"]}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    fuzz([tmp_path / "study.yaml"], lambda: read_study(tmp_path / "study.yaml"))


# ---- prompts, captions, videos ----------------------------------------------------------------------------------------


def test_prompts_and_the_names_made_of_them(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two über \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "seed": 70, "image": "a.png"}\n')

    def read(file: str):
        for number, job in enumerate(read_jobs(tmp_path / file, 5)):
            name = dataclasses.replace(job, image=None).name(number, Settings(), "m", "")
            assert Path(name).name == name and name.isascii() and len(name) < 255

    for name in ("p.txt", "p.jsonl"):
        fuzz([tmp_path / name], lambda name=name: read(name))


def test_manifests(tmp_path):
    record = json.dumps({"file": "a.mp4", "prompt": "one"}) + "\n"
    (tmp_path / "manifest.jsonl").write_text(record)

    def read():
        write_manifest(tmp_path / "manifest.jsonl", {"b.mp4": {"file": "b.mp4"}})
        (tmp_path / "manifest.jsonl").write_text(record)

    fuzz([tmp_path / "manifest.jsonl"], read)


def test_vbench_prompts(tmp_path):
    (tmp_path / "list.txt").write_text("a red circle\na blue square/circle\n../x\n")

    def read():
        names = [video.file for video in wanted(read_prompts(tmp_path / "list.txt"), 2, 0)]
        assert all(Path(name).name == name and len(f".{name}.tmp".encode()) <= 255 for name in names) and len(set(names)) == len(names)

    fuzz([tmp_path / "list.txt"], read)


def test_lists_of_clips(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"video_path": "a.mp4", "caption": "x"}\n{"video_path": "b.mp4", "caption": "y"}\n')
    (tmp_path / "videos2caption.json").write_text(json.dumps([{"path": "0.mp4", "cap": ["a blue square", "x"]}, {"path": "b", "cap": "y"}]))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "clips" / "a.txt").write_text("ein rotes Dreieck, häßlich\n")

    for source, file in (("a.jsonl",) * 2, ("videos2caption.json",) * 2, ("clips", "clips/a.txt")):
        fuzz([tmp_path / file], lambda source=source: list_clips(tmp_path / source))


def test_videos(tmp_path):
    write_video(tmp_path / "a.mp4", moving_shapes.draw(moving_shapes.CAPTIONS[0], np.random.default_rng(0), 5, 32, 32), 8)

    def read():
        film = size_of_film(tmp_path / "a.mp4", 8)
        best_size([VideoSize(5, 32, 32), VideoSize(1, 64, 32)], film)
        read_video(tmp_path / "a.mp4", 5, 32, 32, 8)

    fuzz([tmp_path / "a.mp4"], read, INPUTS // 5)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(tmp_path / name)

    def read():
        for name in ("a.png", "a.jpg", "a.webp"):
            read_image(tmp_path / name, 16, 16)

    fuzz([tmp_path / name for name in ("a.png", "a.jpg", "a.webp")], read, INPUTS // 2)


# ---- datasets and references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".safetensors"])
@pytest.mark.parametrize("image_embeds_shape", [None, (5, 20)], ids=["text", "image"])
def test_latents(tmp_path, ending, image_embeds_shape):
    folder = make_dataset(tmp_path / "data", samples=2, shapes=((4, 1, 2, 2),), image_embeds_shape=image_embeds_shape)

    def read():
        dataset = LatentsDataset(str(folder))
        assert sum(map(len, dataset.buckets().values())) == len(dataset) and dataset.most_prompt_tokens and dataset.video
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample.latents.shape == dataset.about[index]["latents_shape"] and sample.prompt_embeds.shape[1] == 16
            if dataset.image_embeds_shape:
                dataset.first_frame(index)

    fuzz(sorted(folder.glob(f"*{ending}")), read, INPUTS // 2)


def test_references(tmp_path):
    save_file({"features": torch.randn(2, 63)}, tmp_path / "reference.safetensors")

    def read():
        features = moving_shapes.read_features(tmp_path / "reference.safetensors")
        assert moving_shapes.frechet_distance(np.eye(4, 63), features) > -1e-6

    fuzz([tmp_path / "reference.safetensors"], read)


# ---- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(mini_model, tmp_path) -> Path:
    folder = shutil.copytree(mini_model, tmp_path / "model")
    (folder / "sampling.json").write_text(Settings(steps=4).model_dump_json())
    return folder


# A fifth of the inputs each where a whole module is built of every one: together they are a thousand, and all go through
# the readers of the three tests that follow.


def test_configurations_of_a_model(model):
    def read():
        find_model(str(model))
        read_settings(model)
        load_scheduler(model)
        transformer_config(model)

    names = ("model_index.json", "sampling.json", "scheduler/scheduler_config.json", "transformer/config.json")
    fuzz([model / name for name in names], read)


def test_configurations_of_the_parts(model, mini_image_model):
    parts = {
        "vae/config.json": diffusers_parts.Autoencoder,
        "text_encoder/config.json": diffusers_parts.Text,
        "image_encoder/config.json": diffusers_parts.Vision,
        "image_processor/preprocessor_config.json": diffusers_parts.Pictures,
    }
    for name in ("image_encoder", "image_processor"):
        shutil.copytree(mini_image_model / name, model / name)

    for name, part in parts.items():
        fuzz([model / name], lambda part=part, file=model / name: diffusers_parts.given(part, file))


def test_weights_in_several_files(tmp_path):
    tensors = {name: torch.randn(7, 3) for name in "abc"}
    save_weights(tmp_path, {name: Spec((7, 3), torch.float32) for name in "abc"}, tensors.__getitem__, largest_file=100)

    def read():
        for tensor in stored_tensors(tmp_path).values():
            assert tensor.file.parent == tmp_path and tensor.read().dtype == tensor.dtype

    fuzz([tmp_path / INDEX, *tmp_path.glob("*-of-*.safetensors")], read)


def test_transformers(model):
    part = model / "transformer"
    fuzz([part / "config.json", part / "diffusion_pytorch_model.safetensors"], lambda: whole_transformer(model, torch.float32), INPUTS // 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_autoencoders(model):
    size = {"base_dim": 4, "z_dim": 2, "latents_mean": [0.0, 1.0], "latents_std": [1.0, 2.0]}
    AutoencoderKLWan(**size, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]).save_pretrained(model / "vae")
    files = [model / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    fuzz(files, lambda: load_autoencoder(model, CPU), INPUTS // 5)


def test_text_encoders(model):
    part = model / "text_encoder"
    fuzz([part / "config.json", part / "model.safetensors"], lambda: diffusers_parts.text_encoder(part), INPUTS // 5)


def test_image_encoders(mini_image_model, tmp_path):
    part = shutil.copytree(mini_image_model / "image_encoder", tmp_path / "image_encoder")
    fuzz([part / "config.json", part / "model.safetensors"], lambda: diffusers_parts.image_encoder(part), INPUTS // 5)


def test_image_processors(mini_image_model, tmp_path):
    part = shutil.copytree(mini_image_model / "image_processor", tmp_path / "image_processor")
    fuzz([part / "preprocessor_config.json"], lambda: diffusers_parts.image_processor(part))


def test_tokenizers(model):
    part = model / "tokenizer"
    fuzz([part / "tokenizer_config.json", part / "tokenizer.json"], lambda: load_tokenizer(part), INPUTS // 5)


# ---- original folders -------------------------------------------------------------------------------------------------


def test_transformers_in_the_original_layout(mini_model, tmp_path):
    folder = convert(mini_model, tmp_path / "original")

    def read():
        assert transformer_config(folder).keys() and transformer_tensors(folder)
        whole_transformer(folder, torch.float32)

    fuzz([folder / "config.json", folder / "diffusion_pytorch_model.safetensors"], read, INPUTS // 5)


def test_pickles(tmp_path):
    torch.save({"a.weight": torch.randn(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "a.pth")

    def read():
        for tensor in read_pickle(tmp_path / "a.pth").values():
            tensor.float().sum()

    fuzz([tmp_path / "a.pth"], read)


def damaged_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """A name more, less or other, or a shape that is another."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match rng.randrange(6):
        case 0:
            tensors[rng.choice(("x", f"{name}.x", name[1:], name.replace("0", "7"), name.replace("0", "-1"), ""))] = tensor
        case 1:
            tensors[name] = tensor[None]
        case 2:
            tensors[name] = tensor.flatten()
        case 3 if tensor.ndim:
            tensors[name] = tensor[..., :0]
        case 4 if tensor.ndim:
            tensors[name] = tensor[..., :1]
    return tensors


@pytest.mark.parametrize("part", ["Wan2.1_VAE.pth", "models_t5.pth", "models_clip.pth"])
def test_tensors_of_the_original_parts(tmp_path, monkeypatch, part):
    parts = make_parts()
    image = CLIPVisionConfig(hidden_size=80, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1, image_size=16, patch_size=8)
    make = {
        "Wan2.1_VAE.pth": lambda: {vae_name(name): tensor for name, tensor in AutoencoderKLWan(base_dim=4).state_dict().items()},
        "models_t5.pth": lambda: text_tensors(parts["text_encoder"].state_dict()),
        "models_clip.pth": lambda: clip_tensors(CLIPVisionModel(image).state_dict()),
    }
    read = {
        "Wan2.1_VAE.pth": original_parts.autoencoder,
        "models_t5.pth": original_parts.text_encoder,
        "models_clip.pth": original_parts.image_encoder,
    }
    (tmp_path / part).touch()
    whole, rng, refused = make[part](), random.Random(0), 0
    for _ in range(INPUTS // 5):
        monkeypatch.setattr(original_parts, "read_pickle", lambda file: damaged_tensors(whole, rng))
        try:
            read[part](tmp_path)
        except UserError as error:
            refused += 1
            assert part in str(error)
    assert refused > INPUTS // 10

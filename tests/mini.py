"""A Wan2.1 far smaller than tiny, with random weights, and a dataset for it: what the tests run on."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dmd_ds.data.latents import LatentsWriter
from dmd_ds.recipe import Recipe

TEXT_WIDTH = 16
LATENTS_SHAPE = (4, 2, 4, 4)
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}


def make_transformer(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**TRANSFORMER)


def make_pipeline(folder: Path) -> Path:
    """A whole diffusers folder; its VAE makes 4 latent channels."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text_config = UMT5Config(
        vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(text_config),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=make_transformer(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


def make_dataset(folder: Path, samples: int = 7, shapes: tuple[tuple[int, ...], ...] = (LATENTS_SHAPE,), words: int = 3) -> Path:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    writer = LatentsWriter(folder, fps=8, negative_embeds_LD=random(1, TEXT_WIDTH), samples_a_shard=3)
    for i in range(samples):
        shape = shapes[i % len(shapes)]
        size = {"frames": 4 * shape[1] - 3, "height": 8 * shape[2], "width": 8 * shape[3]}
        writer.add(random(*shape), random(words + i % 4, TEXT_WIDTH), caption=f"sample {i}", source=f"{i}.mp4", **size)
    writer.close()
    return folder


def make_recipe(folder: Path, **changes) -> Recipe:
    """A recipe over the mini model and dataset in `folder`, made there when missing; sections are merged."""
    if not (folder / "model").exists():
        make_pipeline(folder / "model")
        make_dataset(folder / "data")
    tree = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "save_every": 100,
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "data"), "batch_size": 2},
        "generator": {"lr": 1e-3},
        "fake_score": {"lr": 1e-2, "updates_per_generator_update": 2, "lora_rank": 4, "lora_alpha": 8},
        "validation": {"every": 0},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return Recipe.model_validate(tree)

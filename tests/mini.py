"""A Wan2.1 far smaller than tiny, with random weights, and a dataset for it: what the tests run on. One for each, text to video
and image to video."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from dmd_ds.data.latents import FirstFrame, LatentsWriter
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
IMAGE_EMBEDS_SHAPE = (5, 20)  # CLIP sees 2 x 2 patches and one token for all
IMAGE_TRANSFORMER = {**TRANSFORMER, "in_channels": 4 + 4 + 4, "image_dim": IMAGE_EMBEDS_SHAPE[1], "added_kv_proj_dim": 24}


def make_transformer(seed: int = 0, config: dict = TRANSFORMER) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**config)


def make_parts() -> dict:
    """All of a pipeline but its transformer; the VAE makes 4 latent channels."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text_config = UMT5Config(
        vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    return dict(
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
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def make_pipeline(folder: Path) -> Path:
    """A whole diffusers folder."""
    parts = make_parts()
    WanPipeline(**parts, transformer=make_transformer()).save_pretrained(folder)
    return folder


def make_image_pipeline(folder: Path) -> Path:
    """The same for image to video, with the tensors that no model uses in its transformer's file, as in the published ones."""
    parts = make_parts()
    parts["vae"].register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.0, 1.5])
    clip = CLIPVisionConfig(
        hidden_size=IMAGE_EMBEDS_SHAPE[1], intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    WanImageToVideoPipeline(
        **parts,
        transformer=make_transformer(config=IMAGE_TRANSFORMER),
        image_encoder=CLIPVisionModel(clip),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ).save_pretrained(folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    return folder


def make_dataset(
    folder: Path,
    samples: int = 7,
    shapes: tuple[tuple[int, ...], ...] = (LATENTS_SHAPE,),
    words: int = 3,
    image_embeds_shape: tuple[int, int] | None = None,
    captions: list[str] | None = None,
) -> Path:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    writer = LatentsWriter(folder, fps=8, negative_embeds_LD=random(1, TEXT_WIDTH), samples_a_shard=3)
    for i in range(samples):
        shape = shapes[i % len(shapes)]
        size = {"frames": 4 * shape[1] - 3, "height": 8 * shape[2], "width": 8 * shape[3]}
        first_frame = FirstFrame(random(*shape), random(*image_embeds_shape)) if image_embeds_shape else None
        caption = f"sample {i}" if captions is None else captions[i]
        writer.add(random(*shape), random(words + i % 4, TEXT_WIDTH), first_frame, caption=caption, source=f"{i}.mp4", **size)
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
        "validation": {"every": 0, "teacher_steps": 2},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return Recipe.model_validate(tree)

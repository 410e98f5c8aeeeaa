"""The parts of a diffusers Wan2.1 folder beside its transformer: what their configurations say, and the modules made of it.

A folder may come from elsewhere. Of a configuration the keys below are read, each checked, and nothing else; a module is filled
with the tensors of the safetensors beside it and with no others. So no class, code or pickle that a folder names is ever loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from pydantic import BaseModel, ConfigDict, Field
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from dmd_ds.errors import UserError, read_json_mapping
from dmd_ds.recipe import validated
from dmd_ds.wan.original_parts import filled, layers_of
from dmd_ds.wan.tensors import stored_tensors

Size = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=256)]
Small = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """Of a part's configuration, what is read; a key that is not there has the library's default."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Transformer(Part):
    num_layers: Few
    num_attention_heads: Size
    attention_head_dim: Size
    in_channels: Size
    out_channels: Size
    text_dim: Size
    patch_size: list[Few] = Field(min_length=3, max_length=3)
    freq_dim: Size = 256
    ffn_dim: Size = 13824
    eps: Small = 1e-6
    cross_attn_norm: bool = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    image_dim: Size | None = None
    added_kv_proj_dim: Size | None = None
    rope_max_seq_len: Annotated[int, Field(ge=1, le=65536)] = 1024
    pos_embed_seq_len: Size | None = None


class Autoencoder(Part):
    base_dim: Size = 96
    decoder_base_dim: Size | None = None
    z_dim: Size = 16
    dim_mult: list[Few] = Field([1, 2, 4, 4], min_length=1, max_length=8)
    num_res_blocks: Annotated[int, Field(ge=1, le=8)] = 2
    attn_scales: list[float] = []
    temperal_downsample: list[bool] = [False, True, True]
    dropout: Share = 0.0
    latents_mean: list[float] = [0.0] * 16
    latents_std: list[Annotated[float, Field(gt=0)]] = [1.0] * 16
    is_residual: Literal[False] = False
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    patch_size: None = None
    scale_factor_temporal: Literal[4] = 4
    scale_factor_spatial: Literal[8] = 8


class Text(Part):
    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Few
    num_heads: Size
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**16)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=2**20)] = 128
    dropout_rate: Share = 0.1
    layer_norm_epsilon: Small = 1e-6
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"


class Vision(Part):
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Few
    num_attention_heads: Size = 12
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Size = 32
    num_channels: Literal[3] = 3
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Small = 1e-5
    attention_dropout: Share = 0.0


class Edges(BaseModel):
    model_config = ConfigDict(extra="forbid")
    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]


class ShortestEdge(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shortest_edge: Annotated[int, Field(ge=1, le=4096)]


class Pictures(Part):
    do_resize: bool = True
    size: Edges | ShortestEdge = ShortestEdge(shortest_edge=224)
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    do_center_crop: bool = True
    crop_size: Edges = Edges(height=224, width=224)
    do_rescale: bool = True
    rescale_factor: Small = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.26862954, 0.26130258, 0.27577711), min_length=3, max_length=3)
    do_convert_rgb: bool = True


class UniPC(Part):
    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    flow_shift: Annotated[float, Field(gt=0)] = 1.0
    num_train_timesteps: Literal[1000] = 1000
    solver_order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: list[Annotated[int, Field(ge=0)]] = []
    final_sigmas_type: Literal["zero"] = "zero"
    thresholding: Literal[False] = False
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False
    rescale_betas_zero_snr: Literal[False] = False
    shift_terminal: None = None


def given(part: type[Part], path: Path) -> dict[str, Any]:
    """What a part's configuration file says, checked; keys that it leaves out are left out."""
    return validated(part, read_json_mapping(path), str(path)).model_dump(exclude_unset=True)


def autoencoder(folder: Path) -> AutoencoderKLWan:
    path = folder / "config.json"
    sizes = validated(Autoencoder, read_json_mapping(path), str(path))
    if not len(sizes.latents_mean) == len(sizes.latents_std) == sizes.z_dim:
        counts = f"{len(sizes.latents_mean)} and {len(sizes.latents_std)}"
        raise UserError(f"{path}: latents_mean and latents_std are {counts} numbers, z_dim={sizes.z_dim} has as many channels")
    if len(sizes.temperal_downsample) != len(sizes.dim_mult) - 1:
        raise UserError(f"{path}: temperal_downsample={sizes.temperal_downsample} is not one less than dim_mult={sizes.dim_mult}")
    with torch.device("meta"):  # no memory for sizes that the tensors may not have
        vae = AutoencoderKLWan(**sizes.model_dump(exclude_unset=True))
    return filled(vae, {name: tensor.read() for name, tensor in stored_tensors(folder).items()}, folder)


def text_encoder(folder: Path) -> UMT5EncoderModel:
    path = folder / "config.json"
    config, stored = given(Text, path), stored_tensors(folder)
    check_layers(path, "num_layers", config["num_layers"], layers_of(stored, "encoder.block."))
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    if "shared.weight" in tensors:  # one table under two names, of which a file may hold one alone
        tensors.setdefault("encoder.embed_tokens.weight", tensors["shared.weight"])
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**config))
    return filled(encoder, tensors, folder)


def check_layers(path: Path, key: str, said: int, stored: int) -> None:
    """`UserError` unless as many layers are stored as the configuration says: before so many are built."""
    if said != stored:
        raise UserError(f"{path}: {key}={said}, the tensors beside it are of {stored} layers")


def image_encoder(folder: Path) -> CLIPVisionModel:
    path = folder / "config.json"
    sizes = validated(Vision, read_json_mapping(path), str(path))
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if getattr(sizes, whole) % getattr(sizes, part):
            raise UserError(f"{path}: {part}={getattr(sizes, part)} does not divide {whole}={getattr(sizes, whole)}")
    stored = {name.removeprefix("vision_model."): tensor for name, tensor in stored_tensors(folder).items()}
    stored.pop("embeddings.position_ids", None)  # in older files: the numbers 0, 1, 2, ...
    check_layers(path, "num_hidden_layers", sizes.num_hidden_layers, layers_of(stored, "encoder.layers."))
    with torch.device("meta"):
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes.model_dump(exclude_unset=True)))
    encoder = filled(encoder, {name: tensor.read() for name, tensor in stored.items()}, folder)
    encoder.embeddings.position_ids = torch.arange(encoder.embeddings.num_positions)[None]  # a buffer that no file holds
    return encoder


def image_processor(folder: Path) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(**given(Pictures, folder / "preprocessor_config.json"))


def scheduler(folder: Path) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(**given(UniPC, folder / "scheduler_config.json"))

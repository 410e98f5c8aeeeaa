"""The original Wan2.1 beside diffusers': how its tensors are named, and what its configuration leaves to be read from them.

Names are translated module by module, both ways, and a name that is in neither table is an error: nothing is guessed.
"""

import math
import re
from collections.abc import Mapping

from dmd_ds.errors import UserError
from dmd_ds.recipe import SHORT

HEAD_WIDTH = 128  # of every published Wan2.1; its config.json says how many heads there are, where there is one
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of files repackaged for other programs
GUIDANCE = "condition_embedder.guidance_embedder"  # the cfg-distilled Wan2.1's; stock diffusers knows no such module

TOP = {  # module -> module
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "guidance_embedding.0": f"{GUIDANCE}.linear_1",
    "guidance_embedding.2": f"{GUIDANCE}.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
TOP_TENSORS = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
BLOCK = {
    **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
    **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    **{f"self_attn.norm_{part}": f"attn1.norm_{part}" for part in "qk"},
    **{f"cross_attn.norm_{part}": f"attn2.norm_{part}" for part in "qk"},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # each counts the norms in its own order; this one stands before the cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
BLOCK_TENSORS = {"modulation": "scale_shift_table"}


def _translate(name: str, top: Mapping, top_tensors: Mapping, block: Mapping, block_tensors: Mapping) -> str | None:
    inside = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    head, rest = inside.groups() if inside else ("", name)
    modules, tensors = (block, block_tensors) if inside else (top, top_tensors)
    if rest in tensors:
        return head + tensors[rest]
    module, dot, kind = rest.rpartition(".")
    return f"{head}{modules[module]}{dot}{kind}" if kind in ("weight", "bias") and module in modules else None


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def to_diffusers(name: str) -> str | None:
    """diffusers' name of an original tensor, None where there is none."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return _translate(name, TOP, TOP_TENSORS, BLOCK, BLOCK_TENSORS)


def to_original(name: str) -> str | None:
    """The original name of a diffusers tensor, None where there is none."""
    return _translate(name, _turned(TOP), _turned(TOP_TENSORS), _turned(BLOCK), _turned(BLOCK_TENSORS))


def diffusers_config(shapes: Mapping[str, tuple[int, ...]], config: Mapping, where: str) -> dict:
    """The WanTransformer3DModel configuration of a model with these tensors (diffusers' names).

    `config` is the original config.json, which leaves text width, patch size and image parts out; `where` names it in errors.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{where}: no {to_original(name)} among its tensors; this is not a whole Wan2.1 transformer")
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise UserError(f"{where}: {name} is {list(shapes[name])}, a tensor of {dimensions} dimensions is expected")
        return shapes[name]

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    if "num_heads" not in config and width % HEAD_WIDTH:
        raise UserError(f"{where}: config.json names no num_heads, and width {width} is no multiple of {HEAD_WIDTH}")
    heads = config.get("num_heads", width // HEAD_WIDTH)
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(f"{where}: config.json's num_heads={SHORT.repr(heads)} does not divide the width {width}")
    if width // heads % 2:
        raise UserError(f"{where}: {heads} heads of {width // heads} of the width {width}; rotary positions turn pairs, so it must be even")
    eps = config.get("eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"{where}: config.json's eps={SHORT.repr(eps)} is no small number, such as 1e-6")
    blocks = {name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise UserError(f"{where}: its tensors are of {len(blocks)} blocks, which are not numbered from 0 without gaps")
    text_dim = shape("condition_embedder.text_embedder.linear_1.weight", 2)[1]
    image_norm, image_position = (f"condition_embedder.image_embedder.{part}" for part in ("norm1.weight", "pos_embed"))
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight", 2)[0] // math.prod(patch),
        "text_dim": text_dim,
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": len(blocks),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": eps,
        "image_dim": shape(image_norm, 1)[0] if image_norm in shapes else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": shape(image_position, 3)[1] if image_position in shapes else None,
    }


def original_config(config: Mapping) -> dict:
    """The original config.json of a WanTransformer3DModel's configuration."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if config.get("image_dim") is None else "i2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }

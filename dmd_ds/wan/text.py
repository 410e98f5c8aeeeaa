"""The UMT5 text encoder behind two small functions."""

import dataclasses
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from dmd_ds.errors import UserError, read_json_mapping
from dmd_ds.wan import diffusers_parts, original_parts
from dmd_ds.wan.denoiser import TEXT_TOKENS
from dmd_ds.wan.original_parts import is_original


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    tokenizer: PreTrainedTokenizerBase
    encoder: UMT5EncoderModel


def load_text_encoder(folder: Path, device: torch.device) -> TextEncoder:
    if is_original(folder):
        tokenizer, encoder = folder / original_parts.TOKENIZER, original_parts.text_encoder(folder)
    else:
        tokenizer, encoder = folder / "tokenizer", diffusers_parts.text_encoder(folder / "text_encoder")
    return TextEncoder(load_tokenizer(tokenizer), encoder.to(device).eval().requires_grad_(False))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Of a folder that may come from elsewhere: code that it brings along is not run."""
    read_json_mapping(folder / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{folder}: not readable as a tokenizer: {error}") from error


@torch.no_grad()
def encode_prompts(text: TextEncoder, prompts: list[str]) -> list[torch.Tensor]:
    """For each prompt its embeddings `[L, D]` without padding, float32 on the CPU, cleaned and cut as Wan2.1 does."""
    tokens = text.tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="longest",
        max_length=TEXT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text.encoder.device)
    embeds_BLD = text.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float().cpu()
    return [row[:length].clone() for row, length in zip(embeds_BLD, tokens.attention_mask.sum(1).tolist(), strict=True)]


def padded_tokens(longest: int, dtype: torch.dtype) -> int:
    """To how many tokens prompts are padded for a model of that type.

    In fp32 no more than needed, at most Wan's 512: room for one padding token, a multiple of 8. In bf16 all 512: the
    logarithm with which one padding token stands for many (see wan.denoiser.padding_bias) would be rounded to 1 percent.
    """
    return min(TEXT_TOKENS, (longest // 8 + 1) * 8) if dtype == torch.float32 else TEXT_TOKENS

"""The UMT5 text encoder behind two small functions."""

import dataclasses
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from dmd_ds.wan.denoiser import TEXT_TOKENS


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    tokenizer: PreTrainedTokenizerBase
    encoder: UMT5EncoderModel


def load_text_encoder(folder: Path, device: torch.device) -> TextEncoder:
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").to(device).eval().requires_grad_(False)
    return TextEncoder(AutoTokenizer.from_pretrained(folder / "tokenizer"), encoder)


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


def padded_tokens(longest: int) -> int:
    """To how many tokens a set of prompts is padded: room for one padding token, a multiple of 8, at most Wan's 512."""
    return min(TEXT_TOKENS, (longest // 8 + 1) * 8)

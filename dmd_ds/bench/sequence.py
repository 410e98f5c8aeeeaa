"""One sample over several ranks, by Ulysses, by ring and by both: what a block keeps for its backward, and what it sends.

Against the closed form: forward 4 L D / P by all-to-all, 2 L D (R - 1) / (U R) by ring, and 2 L D / U more for the gradients' round.
"""

import dataclasses

import torch
from diffusers import WanTransformer3DModel

from dmd_ds.bench.counting import counting_kept_bytes, counting_sent_bytes
from dmd_ds.bench.ranks import run_ranks
from dmd_ds.errors import UserError
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel
from dmd_ds.wan.denoiser import WanDenoiser

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]  # Ulysses, ring
BLOCKS, HEADS, HEAD_DIM, TEXT_TOKENS = 2, 4, 64, 8


@dataclasses.dataclass(frozen=True)
class Closed:
    """Bytes a rank sends a block in float32, from the sizes alone. L tokens, D width, U Ulysses, R ring."""

    tokens: int
    width: int
    ulysses: int
    ring: int

    @property
    def forward(self) -> float:
        # queries, keys, values and result change hands once; keys and values pass R - 1 times on
        all_to_all = 4 * self.tokens * self.width / (self.ulysses * self.ring) if self.ulysses > 1 else 0
        ring = 2 * self.tokens * self.width / self.ulysses * (self.ring - 1) / self.ring
        return 4 * (all_to_all + ring)

    @property
    def backward(self) -> float:
        # the same again, and the gradients of keys and values pass R times: home at last
        gradients = 2 * self.tokens * self.width / self.ulysses if self.ring > 1 else 0
        return self.forward + 4 * gradients


def on_rank(ulysses: int, ring: int, tokens: int) -> dict[str, float]:
    """A block's bytes, from a model of BLOCKS and one of twice as many, so that what is no block cancels."""
    with joined(Parallel(ulysses=ulysses, ring=ring)) as mesh:
        numbers = []
        for blocks in (BLOCKS, 2 * BLOCKS):
            torch.manual_seed(0)
            transformer = WanTransformer3DModel(
                num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=64, freq_dim=64, ffn_dim=4 * HEADS * HEAD_DIM,
                num_layers=blocks,
            )  # fmt: skip
            model = WanDenoiser(transformer, SequenceParallel(mesh, torch.float32))
            x_BCTHW = torch.randn(1, 16, 4, 2, tokens // 2)  # 4 x 1 x tokens / 4 patches
            with counting_sent_bytes() as sent:
                with counting_kept_bytes(model) as kept:
                    out = model(x_BCTHW, torch.tensor([0.5]), torch.randn(1, TEXT_TOKENS, 64))
                kept_bytes, forward = sum(storage.nbytes() for storage in kept.values()), sent["bytes"]
                out.sum().backward()
                numbers.append((kept_bytes, forward, sent["bytes"] - forward))
        kept_bytes, forward, backward = ((late - early) / BLOCKS for early, late in zip(*numbers, strict=True))
        return {"kept": kept_bytes, "forward": forward, "backward": backward}


def measure_layout(ulysses: int, ring: int, tokens: int) -> dict[str, float]:
    return run_ranks("sequence", ulysses * ring, ulysses=ulysses, ring=ring, tokens=tokens)


def measure(tokens: int) -> list[dict[str, float]]:
    if tokens % 4:
        raise UserError(f"--tokens {tokens}: must divide by 4, or padding is counted too")
    rows = []
    for ulysses, ring in LAYOUTS:
        found = measure_layout(ulysses, ring, tokens)
        closed = Closed(tokens, HEADS * HEAD_DIM, ulysses, ring)
        row = {"ulysses": ulysses, "ring": ring, **found}
        whole = rows[0]["kept"] if rows else found["kept"]
        row["kept_ratio"] = found["kept"] / (whole / (ulysses * ring))
        for way in ("forward", "backward"):
            row[f"{way}_ratio"] = found[way] / getattr(closed, way) if getattr(closed, way) else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    sent = "sent forward, MB | / closed form | sent backward, MB | / closed form |"
    lines = ["| Ulysses | ring | kept for backward, MB | x P / whole | " + sent, "|---" * 8 + "|"]
    for row in rows:
        cells = [f"{row['ulysses']}", f"{row['ring']}", f"{row['kept'] / 1e6:.3f}", f"{row['kept_ratio']:.3f}"]
        for way in ("forward", "backward"):
            ratio = row[f"{way}_ratio"]
            cells += [f"{row[way] / 1e6:.3f}", f"{ratio:.3f}" if ratio is not None else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

"""What test_attention.py runs on 4 ranks: the attention of a shared sample against that of a whole one, value and gradient, and
an image-to-video denoiser that shares its samples against diffusers' own forward.

Every check is made on every rank, in float32; prints one JSON line of largest differences on rank 0.
"""

import dataclasses
import json

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import Mesh, joined
from dmd_ds.recipe import Parallel
from dmd_ds.wan.denoiser import TEXT_TOKENS, ImageCondition, WanDenoiser
from tests.mini import IMAGE_EMBEDS_SHAPE, IMAGE_TRANSFORMER, TEXT_WIDTH, make_transformer

LAYOUTS = [(1, 4), (2, 2), (4, 1), (1, 2), (2, 1)]
TOKENS = [16, 18, 5, 13]  # shares of 4, 4, 4, 4; 5, 5, 5, 3; 2, 2, 1, 0; 4, 4, 4, 1


def lay(world: Mesh, ulysses: int, ring: int) -> Mesh:
    """Another mesh over the ranks of this job: xDiT makes one a job, and a test wants them all."""
    size = ulysses * ring

    def mine(groups: list[list[int]]) -> dist.ProcessGroup:
        made = [dist.new_group(ranks) for ranks in groups]
        return next(group for group, ranks in zip(made, groups, strict=True) if world.rank in ranks)

    starts = range(0, world.world_size, size)
    return dataclasses.replace(
        world,
        ulysses=ulysses,
        ring=ring,
        sequence_group=mine([list(range(start, start + size)) for start in starts]),
        ulysses_group=mine([list(range(s + u, s + u + ulysses)) for s in starts for u in range(0, size, ulysses)]),
        ring_group=mine([list(range(s + u, s + size, ulysses)) for s in starts for u in range(ulysses)]),
    )


def differences(mesh: Mesh, tokens: int) -> dict[str, float]:
    sequence = SequenceParallel(mesh, torch.float32)
    draw = torch.Generator().manual_seed(mesh.data_rank)
    q, k, v, weight = (torch.randn(2, tokens, 4, 8, generator=draw) for _ in range(4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in whole)).transpose(1, 2)
    (expected * weight).sum().backward()

    shared = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sequence.attention(*(sequence.shard(x, dim=1) for x in shared), tokens)
    out = sequence.gather(out.flatten(2), tokens).unflatten(2, (4, 8))
    (out * weight).sum().backward()
    # what the engine's mean over ranks makes of it
    for x in shared:
        dist.all_reduce(x.grad, group=mesh.sequence_group)
        x.grad /= mesh.sequence_size
    return {
        "value": float((out - expected).abs().max().detach()),
        **{name: float((s.grad - w.grad).abs().max()) for name, s, w in zip("qkv", shared, whole, strict=True)},
    }


def image_to_video_difference(mesh: Mesh) -> float:
    """Of 18 tokens and a text trimmed to 8, on 4 heads."""
    config = {**IMAGE_TRANSFORMER, "num_attention_heads": 4, "added_kv_proj_dim": 48}
    draw = torch.Generator().manual_seed(mesh.data_rank)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=draw)

    x, channels, embeds, text = random(4, 3, 4, 6), random(8, 3, 4, 6), random(*IMAGE_EMBEDS_SHAPE), random(7, TEXT_WIDTH)
    sigma = torch.tensor([0.3, 0.8])
    padded = [torch.nn.functional.pad(text, (0, 0, 0, tokens - 7)) for tokens in (8, TEXT_TOKENS)]
    with torch.no_grad():
        whole = make_transformer(config=config)
        expected = whole(torch.cat([x, channels], 1), 1000 * sigma, padded[1], embeds, return_dict=False)[0]
        denoiser = WanDenoiser(make_transformer(config=config), SequenceParallel(mesh, torch.float32))
        return float((denoiser(x, sigma, padded[0], image=ImageCondition(channels, embeds)) - expected).abs().max())


def main() -> None:
    with joined(Parallel(ulysses=2, ring=2)) as world:
        found = {f"xdit {tokens}": differences(world, tokens) for tokens in TOKENS}
        for ulysses, ring in LAYOUTS:
            mesh = lay(world, ulysses, ring)
            found |= {f"{ulysses}x{ring} {tokens}": differences(mesh, tokens) for tokens in TOKENS}
            found[f"{ulysses}x{ring} image to video"] = {"value": image_to_video_difference(mesh)}
        assert world.gather_objects(world.rank) == (list(range(world.world_size)) if world.is_first else None)
        everywhere = world.all_gather_objects(found)
        if world.is_first:
            worst = {case: {name: max(rank[case][name] for rank in everywhere) for name in found[case]} for case in found}
            print(json.dumps(worst))


if __name__ == "__main__":
    main()

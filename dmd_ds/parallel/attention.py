"""Self-attention of one sample over several ranks: Ulysses inside a ring (xDiT's layout, on yunchang's collectives).

A sample's tokens are padded to equal shares and dealt out in order over the ranks of its group. Ulysses (Jacobs et al. 2023)
trades, inside its own small group, a share of the tokens with all heads for more tokens with a share of the heads; the ring
(Liu et al. 2023) passes keys and values around and joins the blocks by their log-sum-exp, kept in float32. Padding stands at
the very end, so a block of keys is cut to its real tokens before the kernel sees it: no mask, and any kernel will do.

The ring's forward and backward are here because those of the libraries do not train on every device: what they offer for
torch's own kernels has no backward, or rounds the log-sum-exp to bf16.

Shape suffixes: B batch, L all tokens of a sample, n tokens of one rank or block, N heads, H head width, D model width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from yunchang.comm.all_to_all import SeqAllToAll4D
from yunchang.globals import HAS_FLASH_ATTN
from yunchang.kernels import AttnType, select_flash_attn_impl
from yunchang.ring.utils import RingComm, update_out_and_lse

from dmd_ds.errors import UserError
from dmd_ds.parallel.mesh import Mesh

# ---- kernels that tell the log-sum-exp --------------------------------------------------------------------------------


class CpuFlash:
    """torch's flash attention for the CPU."""

    @staticmethod
    def forward(q_BnNH, k_BnNH, v_BnNH):
        """(attention `[B, n, N, H]`, log-sum-exp `[B, N, n]` float32)."""
        q, k, v = (x.transpose(1, 2) for x in (q_BnNH, k_BnNH, v_BnNH))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH, lse_BNn):
        """(dq, dk, dv) of one block of keys, where `out` and `lse` are those of all keys together."""
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse_BNn, 0.0, False)
        return tuple(grad.transpose(1, 2) for grad in grads)


class CudaFlash:
    """torch's own flash attention for CUDA, where the flash-attn package is not installed."""

    @staticmethod
    def forward(q_BnNH, k_BnNH, v_BnNH):
        q, k, v = (x.transpose(1, 2) for x in (q_BnNH, k_BnNH, v_BnNH))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH, lse_BNn):
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse_BNn, None, None, q.shape[2], k.shape[2], 0.0, False, no_dropout, no_dropout
        )
        return tuple(grad.transpose(1, 2) for grad in grads)


class FlashAttn:
    """The flash-attn package, as xDiT calls it."""

    OPTIONS = {"dropout_p": 0.0, "softmax_scale": None, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None}

    @classmethod
    def forward(cls, q_BnNH, k_BnNH, v_BnNH):
        kernel = select_flash_attn_impl(AttnType.FA, stage="fwd-only")
        return kernel(q_BnNH, k_BnNH, v_BnNH, causal=False, return_softmax=False, **cls.OPTIONS)

    @classmethod
    def backward(cls, dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH, lse_BNn):
        kernel = select_flash_attn_impl(AttnType.FA, stage="bwd-only")
        grads = torch.empty_like(q_BnNH), torch.empty_like(k_BnNH), torch.empty_like(v_BnNH)
        kernel(
            dout_BnNH, q_BnNH, k_BnNH, v_BnNH, out_BnNH, lse_BNn, *grads,
            bwd_causal=False, deterministic=False, rng_state=None, **cls.OPTIONS,
        )  # fmt: skip
        return grads


def ring_kernel(device: torch.device, dtype: torch.dtype) -> type:
    """The kernel a ring runs on; `UserError` where none tells the log-sum-exp that a ring needs."""
    if device.type == "cpu":
        return CpuFlash
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return FlashAttn if HAS_FLASH_ATTN else CudaFlash
    raise UserError(f"parallel.ring: no attention kernel for {device.type} in {dtype} tells its log-sum-exp; use parallel.ring=1")


# ---- the ring ---------------------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    group: dist.ProcessGroup
    kernel: type
    tokens: int  # of all blocks together, padding not counted

    def real_tokens(self, block: int, n: int) -> int:
        """How many of a block's n tokens are not padding."""
        return min(max(self.tokens - block * n, 0), n)


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries `[B, n, N, H]` to the keys and values `[2, B, n, N, H]` of all ranks of a ring."""

    @staticmethod
    def forward(ctx, q_BnNH, kv, ring: Ring):
        comm = RingComm(ring.group)
        q_BnNH, kv = q_BnNH.contiguous(), kv.contiguous()
        own_kv = kv
        out = lse = None
        for hop in range(comm.world_size):
            last = hop + 1 == comm.world_size
            if not last:
                arriving = comm.send_recv(kv)
                comm.commit()
            real = ring.real_tokens((comm.rank - hop) % comm.world_size, kv.shape[2])
            if real:
                block_out, block_lse = ring.kernel.forward(q_BnNH, kv[0, :, :real], kv[1, :, :real])
                out, lse = update_out_and_lse(out, lse, block_out, block_lse)
            if not last:
                comm.wait()
                kv = arriving
        out = out.to(q_BnNH.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q_BnNH, own_kv, out, lse[..., 0].transpose(1, 2).contiguous())
        return out

    @staticmethod
    def backward(ctx, dout_BnNH):
        q_BnNH, kv, out_BnNH, lse_BNn = ctx.saved_tensors
        ring, dout_BnNH = ctx.ring, dout_BnNH.contiguous()
        keys, grads = RingComm(ring.group), RingComm(ring.group)
        dq = torch.zeros_like(q_BnNH, dtype=torch.float32)
        arriving_dkv = torch.zeros_like(kv, dtype=torch.float32)  # goes along with the block it belongs to, home after a full round
        for hop in range(keys.world_size):
            last = hop + 1 == keys.world_size
            if not last:
                arriving = keys.send_recv(kv)
                keys.commit()
            real = ring.real_tokens((keys.rank - hop) % keys.world_size, kv.shape[2])
            if real:
                parts = ring.kernel.backward(dout_BnNH, q_BnNH, kv[0, :, :real], kv[1, :, :real], out_BnNH, lse_BNn)
                dq += parts[0]
            if hop:
                grads.wait()
            dkv = arriving_dkv
            if real:
                dkv[0, :, :real] += parts[1]
                dkv[1, :, :real] += parts[2]
            arriving_dkv = grads.send_recv(dkv)
            grads.commit()
            if not last:
                keys.wait()
                kv = arriving
        grads.wait()
        return dq.to(q_BnNH.dtype), arriving_dkv.to(kv.dtype), None


# ---- a sample's tokens over its group ---------------------------------------------------------------------------------


class GatherTokens(torch.autograd.Function):
    """All ranks' shares `[B, n, D]` in order, `[B, P n, D]`. Backward sums over the ranks: each is one term of the mean that
    the engine takes over all ranks, and the loss on each is the whole one."""

    @staticmethod
    def forward(ctx, x_BnD, group):
        ctx.group = group
        P = dist.get_world_size(group)
        whole_nPBD = x_BnD.new_empty(P * x_BnD.shape[1], x_BnD.shape[0], x_BnD.shape[2])
        dist.all_gather_into_tensor(whole_nPBD, x_BnD.transpose(0, 1).contiguous(), group=group)
        return whole_nPBD.transpose(0, 1)

    @staticmethod
    def backward(ctx, dwhole_BLD):
        dwhole_LBD = dwhole_BLD.transpose(0, 1).contiguous()
        dx_nBD = dwhole_LBD.new_empty(len(dwhole_LBD) // dist.get_world_size(ctx.group), *dwhole_LBD.shape[1:])
        dist.reduce_scatter_tensor(dx_nBD, dwhole_LBD, group=ctx.group)
        return dx_nBD.transpose(0, 1), None


class ShardTokens(torch.autograd.Function):
    """This rank's share of the tokens that lie along `dim`, zeros where they do not divide. Backward gives all of a sample's
    gradient to every rank: the share of each is P times too large, since the loss on each of the P ranks is the whole one."""

    @staticmethod
    def forward(ctx, x, dim, rank, group):
        P = dist.get_world_size(group)
        ctx.dim, ctx.group, ctx.tokens = dim, group, x.shape[dim]
        share = -(-x.shape[dim] // P)
        start = min(rank * share, x.shape[dim])
        mine = x.narrow(dim, start, min(share, x.shape[dim] - start))
        missing = list(mine.shape)
        missing[dim] = share - mine.shape[dim]
        return torch.cat((mine, mine.new_zeros(missing)), dim)

    @staticmethod
    def backward(ctx, dmine):
        P = dist.get_world_size(ctx.group)
        mine_first = dmine.movedim(ctx.dim, 0).contiguous()
        whole = mine_first.new_empty(P * len(mine_first), *mine_first.shape[1:])
        dist.all_gather_into_tensor(whole, mine_first, group=ctx.group)
        return whole[: ctx.tokens].movedim(0, ctx.dim) / P, None, None, None


class SequenceParallel:
    """How a sample's tokens lie on its ranks; on a mesh of one rank a sample, whole. For `dmd_ds.wan.denoiser.WanDenoiser`."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype):
        self.mesh = mesh
        self.size = mesh.ulysses * mesh.ring
        self.rank = mesh.rank % self.size
        self.kernel = ring_kernel(mesh.device, dtype) if mesh.ring > 1 else None

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of the tokens that lie along `dim`, zeros where they do not divide; a gradient comes back for all."""
        return x if self.size == 1 else ShardTokens.apply(x, dim, self.rank, self.mesh.sequence_group)

    def gather(self, x_BnD: torch.Tensor, tokens: int) -> torch.Tensor:
        """All tokens `[B, L, D]` on every rank, padding cut off."""
        if self.size == 1:
            return x_BnD
        return GatherTokens.apply(x_BnD, self.mesh.sequence_group)[:, :tokens]

    def attention(self, q_BnNH: torch.Tensor, k_BnNH: torch.Tensor, v_BnNH: torch.Tensor, tokens: int) -> torch.Tensor:
        """Attention of this rank's queries to all `tokens` of their samples, `[B, n, N, H]`."""
        mesh = self.mesh
        if mesh.sequence_size == 1:
            return dispatch_attention_fn(q_BnNH, k_BnNH, v_BnNH)
        kv = torch.cat((k_BnNH, v_BnNH))
        if mesh.ulysses > 1:
            q_BnNH = SeqAllToAll4D.apply(mesh.ulysses_group, q_BnNH, 2, 1)
            kv = SeqAllToAll4D.apply(mesh.ulysses_group, kv, 2, 1)
        kv = kv.unflatten(0, (2, -1))
        if mesh.ring > 1:
            out_BnNH = RingAttention.apply(q_BnNH, kv, Ring(mesh.ring_group, self.kernel, tokens))
        else:
            out_BnNH = dispatch_attention_fn(q_BnNH, *kv[:, :, :tokens])
        if mesh.ulysses > 1:
            out_BnNH = SeqAllToAll4D.apply(mesh.ulysses_group, out_BnNH.contiguous(), 1, 2)
        return out_BnNH

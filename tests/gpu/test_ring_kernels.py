"""The kernels of a ring on a GPU: attention joined from two blocks of keys is that of all keys, and so are its gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from yunchang.globals import HAS_FLASH_ATTN
from yunchang.ring.utils import update_out_and_lse

from dmd_ds.parallel.attention import CudaFlash, FlashAttn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("kernel", [CudaFlash, FlashAttn])
def test_two_blocks_of_keys_are_all_keys(kernel):
    if kernel is FlashAttn and not HAS_FLASH_ATTN:
        pytest.skip("the flash-attn package is not installed")
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 96, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    whole = [x.float().requires_grad_() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in whole)).transpose(1, 2)
    (expected * dout).sum().backward()

    out = lse = None
    for block in (slice(0, 64), slice(64, 96)):
        out, lse = update_out_and_lse(out, lse, *kernel.forward(q, k[:, block], v[:, block]))
    out, lse = out.to(q.dtype), lse[..., 0].transpose(1, 2).contiguous()
    parts = [kernel.backward(dout, q, k[:, block], v[:, block], out, lse) for block in (slice(0, 64), slice(64, 96))]
    grads = [parts[0][0] + parts[1][0], torch.cat((parts[0][1], parts[1][1]), 1), torch.cat((parts[0][2], parts[1][2]), 1)]
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    for grad, reference in zip(grads, whole, strict=True):
        torch.testing.assert_close(grad.float(), reference.grad, atol=5e-2, rtol=5e-2)

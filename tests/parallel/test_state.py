"""What an optimiser finds when it goes on."""

from types import SimpleNamespace

import pytest
import torch

from dmd_ds.parallel.state import MASTER, EngineState


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu"), (None, "cpu")])
def test_a_fused_kernel_counts_beside_the_weights(fused, where):
    flat = torch.nn.Parameter(torch.empty(4, device="meta"))  # for a GPU: any device but the host's
    adam = torch.optim.AdamW([flat], fused=fused)
    engine = SimpleNamespace(module=torch.nn.Module(), optimizer=None)
    engine.optimizer = SimpleNamespace(fp16_groups=[], fp32_partitioned_groups_flat=[flat], optimizer=adam)
    EngineState(engine).expect(0, [MASTER, "exp_avg"], {"step": 3.0})
    assert adam.state[flat]["step"].device.type == where
    assert adam.state[flat]["exp_avg"].device.type == "meta"

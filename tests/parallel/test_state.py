"""What an optimiser finds when it goes on, whoever wrote it."""

from types import SimpleNamespace

import pytest
import torch

from dmd_ds.parallel.state import MASTER, EngineState


def found_by(adam, flat: torch.nn.Parameter, steps: float) -> dict:
    engine = SimpleNamespace(module=torch.nn.Module(), optimizer=None)
    engine.optimizer = SimpleNamespace(fp16_groups=[], fp32_partitioned_groups_flat=[flat], optimizer=adam)
    EngineState(engine).expect(0, [MASTER, "exp_avg"], {"step": steps})
    return adam.state[flat]


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu"), (None, "cpu")])
@pytest.mark.parametrize("steps", [3, 3.0])  # as DeepSpeed's optimisers count, and torch's
def test_torch_counts_in_a_tensor_of_floats_that_a_fused_kernel_finds_beside_the_weights(fused, where, steps):
    flat = torch.nn.Parameter(torch.empty(4, device="meta"))  # for a GPU: any device but the host's
    found = found_by(torch.optim.AdamW([flat], fused=fused), flat, steps)
    assert (found["step"].device.type, found["step"].dtype) == (where, torch.float32)
    assert found["exp_avg"].device.type == "meta"


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_deepspeed_counts_in_an_integer_and_may_keep_its_moments_finer_than_the_weights(in_fp32, dtype):
    flat = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    adam = type("DeepSpeedCPUAdam", (), {"__module__": "deepspeed.ops.adam.cpu_adam", "fp32_optimizer_states": in_fp32})()
    adam.state = {flat: {}}
    found = found_by(adam, flat, 3.0)
    assert (found["step"], type(found["step"])) == (3, int)
    assert found["exp_avg"].dtype == dtype

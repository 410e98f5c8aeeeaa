"""What test_two_engines.py runs on 2 ranks: python -m tests.distributed.ema_ranks

A small network trains on a ZeRO-3 engine, in bf16 and in fp32, with one layer kept whole on each rank and one that is not,
beside the same network in plain PyTorch.
"""

import copy

import deepspeed
import torch
from torch import nn

from dmd_ds.parallel.ema import ShardedEMA
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel


def have_same_bits(masters: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """The last rank's part ends with padding that holds whatever the memory held: a NaN there equals itself in its bits alone."""
    return all(torch.equal(master.view(torch.int32), other.view(torch.int32)) for master, other in zip(masters, others, strict=True))


def check(bf16: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 33), nn.Linear(33, 3))
    plain = copy.deepcopy(network).to(torch.bfloat16 if bf16 else torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 60},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.1}},
    }
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    kept_whole = [parameter.ds_persist for parameter in network.parameters()]
    assert any(kept_whole) and not all(kept_whole)
    ema = ShardedEMA(engine, 0.5)
    x = torch.randn(4, 7, device=device).to(plain[0].weight.dtype)

    def train() -> None:
        engine.backward(engine(x).float().square().mean())
        engine.step()
        ema.update()

    def compute() -> torch.Tensor:
        with torch.no_grad():
            return engine.module(x)

    train()
    train()
    trained = compute()
    moments = [average.clone() for average in ema.averages]
    with ema.in_place():
        averaged = compute()
        # what computes is what the averages are, put together from both ranks
        for parameter, whole in zip(network.parameters(), plain.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([parameter]):
                whole.data.copy_(parameter)
        assert torch.equal(plain(x), averaged) and not torch.equal(averaged, trained)
        masters = [master.detach().clone() for master in engine.optimizer.fp32_partitioned_groups_flat]
        assert have_same_bits(masters, moments)
    assert torch.equal(compute(), trained)
    assert have_same_bits(ema.averages, moments)

    reference = [master.detach().clone() for master in engine.optimizer.fp32_partitioned_groups_flat]
    train()
    moved = zip(engine.optimizer.fp32_partitioned_groups_flat, reference, strict=True)
    assert all((master - before).abs().nan_to_num().max() > 1e-3 for master, before in moved)
    assert not torch.equal(compute(), trained)


def main() -> None:
    with joined(Parallel()) as world:
        for bf16 in (False, True):
            check(bf16, world.device)


if __name__ == "__main__":
    main()

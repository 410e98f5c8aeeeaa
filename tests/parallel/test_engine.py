"""What is done around DeepSpeed's engine."""

from torch import nn

from dmd_ds.parallel.engine import hooked_where_weights_are


def nothing(*_):
    return None


def test_hooks_that_are_added_stay_on_modules_with_weights_and_on_the_root():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.LayerNorm(2)))
    model[1].register_forward_hook(nothing)  # there before, and not to be touched
    with hooked_where_weights_are(model):
        for part in model.modules():
            part.register_forward_hook(nothing)
            part.register_forward_pre_hook(nothing)
    there = {name: (len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()}
    assert there == {"": (1, 1), "0": (1, 1), "1": (1, 0), "2": (0, 0), "2.0": (1, 1)}

"""A DeepSpeed ZeRO-3 engine from a module and one of the ds_configs/*.json.

Two rules of use, both measured: a forward that is not followed by this engine's own backward goes through `engine.module`
(a foreign backward through `engine` corrupts its next step), and every rank makes the same number of forwards.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups, set_z3_leaf_modules, z3_leaf_module
from pydantic import Field
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME

from dmd_ds.errors import UserError, read_json_mapping
from dmd_ds.planner.sizes import ModelSize, with_auto_sizes
from dmd_ds.recipe import SHORT, Data, Optimizer, find_ds_config, validated
from dmd_ds.section import Section


class Adam(Section):
    """Parameters of DeepSpeed's Adam or PyTorch's. The recipe's own take the place of the first three."""

    lr: Any = None
    betas: Any = None
    weight_decay: Any = None
    eps: Annotated[float, Field(gt=0)] = 1e-8
    torch_adam: bool = Field(False, description="PyTorch's, which needs no compiler")
    fused: bool = Field(False, description="with torch_adam: one kernel an update and no tensors beside the states")
    adam_w_mode: bool = True


class DSOptimizer(Section):
    type: Literal["Adam", "AdamW"] = "AdamW"
    params: Adam = Adam()


class DSConfig(Section):
    """What this project hands to DeepSpeed, which itself passes over a key that it does not know.

    The recipe's own numbers take the place of the last four. Sections without types are checked by DeepSpeed.
    """

    zero_optimization: DeepSpeedZeroConfig
    bf16: DeepSpeedBF16Config = DeepSpeedBF16Config()
    fp16: DeepSpeedFP16Config = DeepSpeedFP16Config()
    optimizer: DSOptimizer = DSOptimizer()
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    aio: dict[str, Any] = {}
    comms_logger: dict[str, Any] = {}
    flops_profiler: dict[str, Any] = {}
    torch_autocast: dict[str, Any] = {}
    train_micro_batch_size_per_gpu: Any = None
    gradient_accumulation_steps: Any = None
    gradient_clipping: Any = None
    steps_per_print: Any = None


def parse_ds_config(file: Path) -> dict[str, Any]:
    """The JSON as it stands; `UserError` names file and line or key."""
    config = read_json_mapping(file)
    stage = config["zero_optimization"].get("stage") if isinstance(config.get("zero_optimization"), dict) else None
    if type(stage) is not int or stage != 3:
        raise UserError(f"{file}: zero_optimization.stage={SHORT.repr(stage)}; this project shards weights, which is stage 3")
    for key in ("offload_param", "offload_optimizer"):  # DeepSpeed passes over the word "auto" here
        offload = config["zero_optimization"].get(key)
        if not isinstance(offload, dict | None):
            raise UserError(f"{file}: zero_optimization.{key}={SHORT.repr(offload)}: a mapping with device is expected")
    if validated(DSConfig, config, str(file)).fp16.enabled:
        raise UserError(f"{file}: fp16 is enabled; this project trains in bf16 on accelerators and fp32 on the CPU")
    return config


def read_ds_config(key: str, path: str) -> dict[str, Any]:
    """The same of the file that a recipe's key names, if this machine can do what it asks for."""
    file = find_ds_config(key, path)
    config = parse_ds_config(file)
    check_offload(file, config["zero_optimization"])
    return config


def check_offload(file: Path, zero: dict[str, Any]) -> None:
    """`UserError` for an offload that this machine, or this project, cannot do."""
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(f"{file}: offload_param.device='nvme'; weights are loaded into memory, the host's at the furthest: 'cpu'")
    optimizer = zero.get("offload_optimizer") or {}
    if optimizer.get("ratio", 1) != 1:
        raise UserError(f"{file}: offload_optimizer.ratio={SHORT.repr(optimizer['ratio'])}: must be 1, all of the states in one place")
    if optimizer.get("device") != "nvme":
        return
    if "nvme_path" not in optimizer:
        raise UserError(f"{file}: offload_optimizer.device='nvme' needs a nvme_path beside it, a folder on that disk")
    if not get_accelerator().get_op_builder("AsyncIOBuilder")().is_compatible():
        raise UserError(f"{file}: offload_optimizer.device='nvme' needs DeepSpeed's async_io, which cannot be built: install libaio-dev")
    if get_accelerator().device_name() == "cuda" and CUDA_HOME is None:
        raise UserError(f"{file}: offload_optimizer.device='nvme' needs DeepSpeed's async_io, which a CUDA toolkit builds: set CUDA_HOME")


def training_dtype() -> torch.dtype:
    """bf16 on accelerators, fp32 on the CPU."""
    return torch.float32 if get_accelerator().device_name() == "cpu" else torch.bfloat16


def complete_ds_config(config: dict[str, Any], optimizer: Optimizer, data: Data, model: ModelSize) -> dict[str, Any]:
    """The JSON with what the recipe decides: batch size, accumulation, clipping, optimiser, precision; and the model: sizes."""
    parameters = {
        **config.get("optimizer", {}).get("params", {}),
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "weight_decay": optimizer.weight_decay,
    }
    return {
        **with_auto_sizes(config, model),
        "bf16": {**config.get("bf16", {}), "enabled": True} if training_dtype() == torch.bfloat16 else {"enabled": False},
        "optimizer": {**config.get("optimizer", {"type": "AdamW"}), "params": parameters},
        "train_micro_batch_size_per_gpu": data.batch_size,
        "gradient_accumulation_steps": data.accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 2**31 - 1,
    }


def sharded_build(ds_config: dict[str, Any], build):
    """`build()` with every weight sharded over the ranks as soon as it is made.

    The groups of hierarchical partitioning (zero_hpz_partition_size) are those of the engine that was built first, if any.
    """
    is_hierarchical = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    inside_nodes = groups._get_zero_param_intra_parallel_group() if is_hierarchical else None
    with deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=inside_nodes):
        return build()


def gather_by_block(module: nn.Module, block: type[nn.Module]) -> nn.Module:
    """Has ZeRO-3 gather each block's weights at once instead of layer by layer: half the time of a small model's forward.

    Only for a module that is trained whole: with a frozen base, LoRA and activation checkpointing DeepSpeed 0.19.8 fails so.
    """
    set_z3_leaf_modules(module, [block])
    return module


@contextlib.contextmanager
def hooked_where_weights_are(module: nn.Module) -> Iterator[None]:
    """Takes the hooks that are added within off the modules with no weight of their own, which have nothing to gather.

    DeepSpeed puts hooks on every module, and each costs two autograd functions a forward: over adapters, which come as three
    modules around a layer, more than half of them serve nothing. The root's end a forward.
    """
    before = {part: {*part._forward_hooks, *part._forward_pre_hooks} for part in module.modules()}
    yield
    for part, there in before.items():
        if part is module or z3_leaf_module(part) or next(part.parameters(recurse=False), None) is not None:
            continue
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in hooks.keys() - there:
                del hooks[key]


def make_engine(module: nn.Module, ds_config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """An engine that trains what requires a gradient in the module."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with hooked_where_weights_are(module):
        engine, *_ = deepspeed.initialize(model=module, model_parameters=trainable, config=ds_config)
    return engine


HELD = "held"


def hold_weights(module: nn.Module) -> None:
    """Weights that the module's forwards gather from now on stay whole: the next forward has them, until `let_weights_go`."""
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.add(HELD)


def let_weights_go(module: nn.Module) -> None:
    """What is whole now is cut up again by whatever uses it next, a forward or a backward, as it passes."""
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.discard(HELD)


def frozen(module: nn.Module, ds_config: dict[str, Any]) -> nn.Module:
    """The same module, trained in no way, with what gathers its weights for each use: `sharded_build` only cuts them."""
    module.requires_grad_(False)
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "offload_optimizer"}
    trains = ("optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "gradient_clipping")
    config = {key: value for key, value in ds_config.items() if key not in trains} | {"zero_optimization": zero}
    with hooked_where_weights_are(module):
        engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine.module


def set_lr(engine: deepspeed.DeepSpeedEngine, optimizer: Optimizer, update: int, updates: int) -> None:
    """The learning rate of this engine's `update`-th optimiser step of so many `updates`, a function of these numbers alone."""
    warm = min(1.0, (update + 1) / (optimizer.warmup_steps + 1), (updates - update) / (optimizer.cooldown_steps + 1))
    for group in engine.optimizer.param_groups:
        group["lr"] = optimizer.lr * warm


def shard(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, as ZeRO-3 cuts it: flattened, padded to equal parts (no communication)."""
    part = parameter.ds_tensor
    start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    mine = whole.reshape(-1)[start : start + part.numel()]
    return torch.nn.functional.pad(mine, (0, part.numel() - mine.numel()))

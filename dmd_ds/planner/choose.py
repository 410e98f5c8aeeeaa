"""The cheapest settings of a recipe that fit: all are tried, it takes milliseconds."""

import dataclasses
import itertools
from collections.abc import Iterator

from dmd_ds.planner.cost import Machine, Seconds, seconds
from dmd_ds.planner.memory import Memory, memory
from dmd_ds.planner.sizes import Setup


@dataclasses.dataclass(frozen=True)
class Plan:
    setup: Setup
    memory: Memory
    seconds: Seconds

    @property
    def seconds_a_sample(self) -> float:
        """What is compared: settings that spread a sample wider see fewer samples a step."""
        return self.seconds.step / self.setup.samples_a_step

    def keys(self) -> list[str]:
        """As they are written after the recipe on a command line."""
        s, zero = self.setup, self.setup.generator_zero
        words = [f"parallel.ulysses={s.ulysses}", f"parallel.ring={s.ring}", f"parallel.gather={s.gather}"]
        words += [f"activation_checkpointing={str(s.checkpointing).lower()}"]
        words += ["activation_offload=true"] if s.activation_offload else []
        if zero.offload_optimizer or zero.offload_param:
            file = f"ds_configs/zero3_{'parameter' if zero.offload_param else 'optimizer'}_offload.json"
            words += [f"generator.ds_config={file}", f"fake_score.ds_config={file}"]
        return words + ([f"generator.lora_rank={s.generator_lora_rank}"] if s.generator_lora else [])


def plan(setup: Setup, machine: Machine) -> Plan:
    return Plan(setup, memory(setup), seconds(setup, machine))


def candidates(setup: Setup, machine: Machine) -> Iterator[Setup]:
    """Every split of a sample inside one node, with and without checkpointing, offloads and LoRA, of the fake score's rank."""
    node = min(setup.gpus, machine.gpus_per_node)
    degrees = [
        (ulysses, ring)
        for ulysses in range(1, node + 1)
        for ring in range(1, node // ulysses + 1)
        if setup.model.heads % ulysses == 0 and setup.gpus % (ulysses * ring) == 0 and node % (ulysses * ring) == 0
    ]
    activations = ((True, False), (True, True), (False, False))  # checkpointing and offload
    offloads = ((False, False), (True, False), (True, True))  # optimiser and parameters
    for (ulysses, ring), gather, (checkpointing, host), (optimizer, param), lora in itertools.product(
        degrees, ("each", "rollout", "update"), activations, offloads, (False, True)
    ):
        where = {"offload_optimizer": optimizer, "offload_param": param}  # on the host Adam is DeepSpeed's own
        generator_zero, fake_score_zero = (
            dataclasses.replace(zero, **where, fused=zero.fused and not optimizer) for zero in (setup.generator_zero, setup.fake_score_zero)
        )
        yield dataclasses.replace(
            setup,
            ulysses=ulysses,
            ring=ring,
            gather=gather,
            checkpointing=checkpointing,
            activation_offload=host,
            generator_lora_rank=setup.generator_lora_rank or (setup.lora_rank if lora else None),
            generator_zero=generator_zero,
            fake_score_zero=fake_score_zero,
        )


def cheapest(setup: Setup, machine: Machine, whole_generator: bool) -> Plan | None:
    """The least seconds a sample of what fits into the machine's usable memory; `whole_generator` keeps the generator's own weights
    trained, since LoRA is another result and not only another cost."""
    plans = (plan(one, machine) for one in candidates(setup, machine) if not (whole_generator and one.generator_lora))
    fitting = [one for one in plans if one.memory.peak <= machine.usable]
    return min(fitting, key=lambda one: (one.seconds_a_sample, one.memory.peak)) if fitting else None

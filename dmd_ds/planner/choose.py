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
        """As they are written after the recipe on a command line; the planner's own options are left as words."""
        s = self.setup
        words = [f"parallel.ulysses={s.ulysses}", f"parallel.ring={s.ring}", f"activation_checkpointing={str(s.checkpointing).lower()}"]
        words += ["optimizer offload"] if s.generator_zero.offload_optimizer else []
        return words + (["generator as LoRA"] if s.generator_lora else [])


def plan(setup: Setup, machine: Machine) -> Plan:
    return Plan(setup, memory(setup), seconds(setup, machine))


def candidates(setup: Setup, machine: Machine) -> Iterator[Setup]:
    """Every split of a sample inside one node, with and without checkpointing, offload and LoRA."""
    node = min(setup.gpus, machine.gpus_per_node)
    degrees = [
        (ulysses, ring)
        for ulysses in range(1, node + 1)
        for ring in range(1, node // ulysses + 1)
        if setup.model.heads % ulysses == 0 and setup.gpus % (ulysses * ring) == 0 and node % (ulysses * ring) == 0
    ]
    for (ulysses, ring), checkpointing, offload, lora in itertools.product(degrees, (True, False), (False, True), (False, True)):
        yield dataclasses.replace(
            setup,
            ulysses=ulysses,
            ring=ring,
            checkpointing=checkpointing,
            generator_lora=lora or setup.generator_lora,
            generator_zero=dataclasses.replace(setup.generator_zero, offload_optimizer=offload),
            fake_score_zero=dataclasses.replace(setup.fake_score_zero, offload_optimizer=offload),
        )


def cheapest(setup: Setup, machine: Machine, whole_generator: bool) -> Plan | None:
    """The least seconds a sample of what fits into the machine's usable memory; `whole_generator` keeps the generator's own weights
    trained, since LoRA is another result and not only another cost."""
    plans = (plan(one, machine) for one in candidates(setup, machine) if not (whole_generator and one.generator_lora))
    fitting = [one for one in plans if one.memory.peak <= machine.usable]
    return min(fitting, key=lambda one: (one.seconds_a_sample, one.memory.peak)) if fitting else None

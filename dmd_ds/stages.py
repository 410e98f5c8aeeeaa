"""The recipe's sections that are of one stage or another."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from dmd_ds.section import NotNegative, NotNegativeNumber, Positive, Section, Sigma


class CfgDistill(Section):
    """A model is given a guidance embedding and learns in one pass what its teacher predicts with guidance in two.

    The noise levels are those of `score`; `score.guidance` is the one at which validation looks.
    """

    guidance_min: NotNegativeNumber = Field(1.0, description="guidance is drawn evenly, for each sample, from here")
    guidance_max: NotNegativeNumber = Field(8.0, description="to here")
    input: Literal["data", "teacher"] = Field("data", description="the dataset's latents, noised, or what the teacher makes on its way")
    teacher_steps: Positive = Field(20, description="of a whole path of the teacher's, second order, where that is the input")
    huber_c: Annotated[float, Field(gt=0)] = Field(0.001, description="below it the loss is a square, above a distance")

    @field_validator("guidance_max")
    @classmethod
    def _check_range(cls, highest: float, before: ValidationInfo) -> float:
        lowest = before.data.get("guidance_min", 0.0)
        if highest < lowest:
            raise PydanticCustomError("range", f"is below guidance_min={lowest:g}")
        return highest


class Regression(Section):
    """Step distillation on the guided teacher's paths: a stage, or a warm-up before DMD2."""

    steps: NotNegative = Field(0, description="trainer steps of DMD2's warm-up, each an update of the generator alone; 0: none")
    target: Literal["end", "half_step", "consistency"] = Field(
        "end",
        description="of the generator from a point of the teacher's path. end: where the path ends; half_step: where two of the "
        "teacher's steps lead that halve one of its own; consistency: where it itself leads from the path's next point",
    )
    teacher_steps: Positive = Field(
        20, description="of the teacher's path; for end of second order, and the generator's own noise levels come to them"
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="null: generator.lr")


class RewardTerm(Section):
    weight: float = Field(description="of it in the sum of all")
    path: str | None = Field(None, description="of the reward's own weights, where it has any")


class Reward(Section):
    """What the few-step generator makes is decoded and judged, and the judgement's gradient flows back (DRaFT)."""

    rewards: dict[str, RewardTerm] = Field(
        {}, description="by name, an entry point of dmd_ds.rewards or module:function: a weight, or weight and path"
    )
    steps: Positive = Field(1, description="of sampling, the last so many, through which the gradient flows")
    frames: Annotated[list[NotNegative], Field(min_length=1)] | Literal["all"] = Field(
        [0], description="which are decoded and judged, numbered from 0"
    )
    penalty: NotNegativeNumber = Field(
        1.0, description="weight of the mean squared difference of its velocity to the start's, which is the model without its adapter"
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _take_weights(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: {"weight": term} if isinstance(term, int | float) else term for name, term in given.items()}


class Rollout(Section):
    """How a sample is made to train on: what the generator is given at an exit step of its schedule, which alone has a gradient."""

    input: Literal["simulation", "data"] = Field(
        "simulation", description="what the generator itself makes in the steps before, or the dataset's latents, noised"
    )
    exit: Literal["random", "last"] = Field(
        "random",
        description="random: any of the steps, drawn evenly, so each step learns from the scores what it makes; last: all steps are "
        "made, the last one learns. A gradient at every step of each rollout would be random's in the mean, at K times the cost",
    )


class Gan(Section):
    """A discriminator on the fake score's features, of the dataset's latents against what the generator makes.

    Both are noised to one level first, drawn uniformly between sigma_min and sigma_max.
    """

    generator_weight: NotNegativeNumber = Field(0.0, description="of its part in the generator's loss; at 0 there is no GAN")
    discriminator_weight: Annotated[float, Field(gt=0)] = Field(0.1, description="of its own loss beside the fake score's")
    head: Literal["token", "convolution"] = Field("token", description="a mark for every token, or convolutions and attention over all")
    blocks: list[NotNegative] | None = Field(None, min_length=1, description="whose features it reads; at 1/2, 3/4 and the end by default")
    width: Positive = Field(256, description="of the head's own layers")
    sigma_min: Sigma = Field(0.02, description="the least noise level")
    sigma_max: Sigma = Field(0.98, description="the greatest")
    r1_weight: NotNegativeNumber = Field(0.0, description="of the approximate R1 penalty on the discriminator's slope at real samples")
    r1_strength: Annotated[float, Field(gt=0)] = Field(0.1, description="of the noise the slope is measured with, in units of latents")

    @property
    def is_on(self) -> bool:
        return self.generator_weight > 0

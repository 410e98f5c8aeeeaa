"""What sections of a recipe, and other typed files, are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1, le=1000)]  # of sampling: a model knows 1000 timesteps
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch takes
Rate = Annotated[float, Field(gt=0, lt=1)]
Sigma = Annotated[float, Field(ge=0, le=1)]
NotNegativeNumber = Annotated[float, Field(ge=0)]
SizeText = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]
Timesteps = Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, given: Any) -> Any:
        if isinstance(given, str) and "\0" in given:
            raise PydanticCustomError("nul", "holds a NUL character")
        return given

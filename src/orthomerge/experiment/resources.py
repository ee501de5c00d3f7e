"""What a job takes on its machine, as a recipe may say it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from orthomerge.errors import RecipeError
from orthomerge.experiment.parts import Part
from orthomerge.io.units import parse_size


class Resources(Part):
    """Processors, GPUs and memory (as in `2GB`) of one kind of job; no memory: it is estimated."""

    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    memory: int | None = None

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse_size(value)
        except RecipeError as problem:
            raise ValueError(str(problem).rstrip(".")) from problem

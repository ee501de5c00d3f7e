"""The smaller parts of a recipe: data, adapter, statistics, text, training, resources."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orthomerge.adapters import OLD_NAMES
from orthomerge.errors import OrthomergeWarning, RecipeError
from orthomerge.io.documents import is_object
from orthomerge.io.rows import DISTILL, SINGLE
from orthomerge.io.units import parse_size
from orthomerge.merging import get_method
from orthomerge.tasks import Task, TaskData
from orthomerge.training import Precision
from orthomerge.training.tracking import check_trackers


class Part(BaseModel):
    """Keys that do not exist are refused; a key of version 0.1 says its new name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, values: Any) -> Any:
        if not is_object(values):
            return values
        new = {old: OLD_NAMES[old] for old in values if OLD_NAMES.get(old) in cls.model_fields}
        for old, name in new.items():
            warnings.warn(f"the recipe's key '{old}' is now '{name}'.", OrthomergeWarning, 2)
        return {new.get(key, key): value for key, value in values.items()}


Rows = Annotated[int, Field(gt=0)] | Literal["all"]


class Data(Part):
    """Rows a task, drawn under `seed` from its fixed pools.

    `train` and `test` may be "all"; with `at_most` they are bounds, and a task with fewer rows
    gives what it has.
    """

    train: Rows = 400
    selection: int = Field(default=100, gt=0)
    test: Rows = 300
    at_most: bool = False
    max_length: int = Field(default=48, gt=2)
    seed: int = 0

    def of(self, task: Task) -> TaskData:
        """The rows of one task; raises what `Task.data` raises."""
        return task.data(
            train=None if self.train == "all" else self.train,
            selection=self.selection,
            test=None if self.test == "all" else self.test,
            seed=self.seed,
            at_most=self.at_most,
        )


class AdapterShape(Part):
    """The LoRA adapter: the paper's defaults."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    targets: list[str] = Field(default=["query", "value"], min_length=1)


class StatisticsPart(Part):
    """The unlabelled sample of each task behind its statistics."""

    samples: int = Field(default=100, gt=0)
    seed: int = 0


class TextPart(Part):
    """Tasks in words (`form: text`): how they are asked, and how answers are scored.

    With `chat` every instruction goes through the chat template of the base's tokenizer.
    `templates` are by task, each an instruction, a file of one, or a mapping of `prompt` and
    `answers` (docs/text-to-text.md); a task without one has its own. `scoring` is "likelihood" or
    "generation"; numbers are always generated.
    """

    scoring: Literal["likelihood", "generation"] = "likelihood"
    chat: bool = False
    templates: dict[str, str | dict[str, Any]] = Field(default_factory=dict)


class TaskTraining(Part):
    """What one task's training does otherwise."""

    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)


class Training(Part):
    """One training; `learning_rate` may be a list, from which each arm takes its own best.

    With a `rate_tolerance` it takes the lowest rate whose score on the selection split is at most
    that far below the best one: a higher rate buys nothing there, and larger updates merge worse.
    `tasks` gives single tasks epochs or a rate of their own, whatever the arm's; `accumulate` cuts
    each batch of `batch_size` into so many passes, for a small card. `report_to` names trackers
    that follow every training ("tensorboard", "wandb", "mlflow"); it changes no result and no key.
    `seed` holds the order of rows and the dropout while `seeds` move the starts. `base_dropout`
    takes the place of the dropout that the base's configuration asks for.
    """

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)
    learning_rate: float | list[float] = 2e-3
    rate_tolerance: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.06, ge=0, lt=1)
    precision: Precision = "float32"
    accumulate: int = Field(default=1, gt=0)
    tasks: dict[str, TaskTraining] = Field(default_factory=dict)
    report_to: list[str] = Field(default_factory=list[str])
    seed: int | None = None
    base_dropout: float | None = Field(default=None, ge=0, lt=1)

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: str | list[str]) -> list[str]:
        return check_trackers([value] if isinstance(value, str) else value)

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | list[float]) -> float | list[float]:
        rates = value if isinstance(value, list) else [value]
        if not rates or min(rates) <= 0:
            raise ValueError("must be a positive number or a list of them")
        return value

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"training.batch_size {self.batch_size} cannot be cut into {self.accumulate} equal "
                "passes: let training.accumulate divide it."
            )
        return self

    def epochs_of(self, task: str) -> float:
        """The epochs of the task that the recipe calls so."""
        own = self.tasks.get(task, TaskTraining()).epochs
        return self.epochs if own is None else own

    def rate_of(self, task: str, rate: float) -> float:
        """The learning rate of the task in an arm of the given rate."""
        own = self.tasks.get(task, TaskTraining()).learning_rate
        return rate if own is None else own

    def content(self, task: str) -> dict[str, Any]:
        """What a training depends on beside its rate: keys that came later count once used."""
        old = {"epochs", "batch_size", "weight_decay", "warmup"}
        later = {"precision", "accumulate", "seed", "base_dropout"}
        new = self.model_dump(include=later, exclude_defaults=True)
        return self.model_dump(include=old) | {"epochs": self.epochs_of(task)} | new


class Known(Part):
    """A figure from elsewhere to print beside ours, in hundredths; never mixed with measured ones.

    `method` is a merging method or "single", `source` where the figure is from, `note` how sure it
    is.
    """

    label: str
    method: str
    average: float | None = None
    tasks: dict[str, float] = Field(default_factory=dict)
    source: str = Field(min_length=1)
    note: str = "unconfirmed"

    @model_validator(mode="after")
    def _names(self) -> Known:
        if self.method not in (SINGLE, DISTILL):
            get_method(self.method)
        if self.average is None and not self.tasks:
            raise RecipeError(f"known '{self.label}' holds no figure: give an average or tasks.")
        return self


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

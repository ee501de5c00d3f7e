"""A recipe: what to run, validated before any work starts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.arms import Arm, Merge
from orthomerge.experiment.distill import Distill
from orthomerge.experiment.parts import (
    AdapterShape,
    Data,
    Known,
    Part,
    Resources,
    StatisticsPart,
    TextPart,
    Training,
)
from orthomerge.io.documents import is_object
from orthomerge.io.rows import DISTILL
from orthomerge.tasks import FORMS, Prompt, get_task, prompt_of

# An arm's name is a folder's, too.
_FOLDER = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
ArmName = Annotated[str, Field(max_length=100, pattern=_FOLDER)]
_MOST = 1_000_000

MERGE = "merge"
"""The tag of an entry of `merges:` that is not distilled."""


def _kind(entry: Any) -> str:
    """Which model an entry of `merges:` is held to."""
    method = entry.get("method") if is_object(entry) else getattr(entry, "method", None)
    return DISTILL if method == DISTILL else MERGE


AnyMerge = Annotated[
    Annotated[Merge, Tag(MERGE)] | Annotated[Distill, Tag(DISTILL)], Discriminator(_kind)
]


class Recipe(Part):
    """The whole of a run. See `recipes/demo.yaml` for one with every key explained."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    base: str
    tasks: list[str] = Field(min_length=2)
    arms: dict[ArmName, Arm] = Field(min_length=1)
    merges: list[AnyMerge] = Field(min_length=1)
    form: str = FORMS[0]
    text: TextPart = TextPart()
    seeds: list[int] = Field(default=[0], min_length=1)
    data: Data = Data()
    adapter: AdapterShape = AdapterShape()
    statistics: StatisticsPart = StatisticsPart()
    training: Training = Training()
    save_merged: bool = False
    known: list[Known] = Field(default_factory=list[Known])
    resources: dict[str, Resources] = Field(default_factory=dict)

    @field_validator("resources")
    @classmethod
    def _kinds(cls, value: dict[str, Resources]) -> dict[str, Resources]:
        from orthomerge.experiment.steps import KINDS  # which know recipes

        for kind in value:
            if kind not in KINDS:
                raise unknown_name("kind of step", kind, KINDS, error=RecipeError)
        return value

    @field_validator("merges")
    @classmethod
    def _each(cls, value: list[AnyMerge]) -> list[AnyMerge]:
        """A distillation with lists is one for each combination."""
        return [e for m in value for e in (m.each() if isinstance(m, Distill) else [m])]

    @model_validator(mode="before")
    @classmethod
    def _room_for_prompts(cls, values: Any) -> Any:
        """A prompt is longer than its text: 128 tokens where the recipe does not say."""
        if not is_object(values) or values.get("form") != "text":
            return values
        data = values.get("data", {})
        return {**values, "data": {"max_length": 128, **data}} if is_object(data) else values

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        """Arms that convert another one are like it where they do not say otherwise."""
        arms = values.get("arms") if is_object(values) else None
        if not is_object(values) or not is_object(arms):
            return values
        whole = dict(arms)
        for name, arm in arms.items():
            how = arm.get("convert") if is_object(arm) else None
            if is_object(how) and "from" in how:
                plain = [a for a, part in arms.items() if is_object(part) and a != name]
                plain = [a for a in plain if not arms[a].get("convert")]
                if how["from"] not in plain:
                    raise unknown_name(
                        "arm", str(how["from"]), plain, where=f"arms.{name}.convert",
                        error=RecipeError,
                    )  # fmt: skip
                whole[name] = {**arms[how["from"]], **arm}
        return {**values, "arms": whole}

    @model_validator(mode="after")
    def _conversions(self) -> Recipe:
        for name, part in self.arms.items():
            if part.convert and len(self.learning_rates_of(name)) > 1:
                raise RecipeError(
                    f"arms.{name} converts '{part.convert.source}', whose learning rate is a "
                    "choice: give that arm one rate."
                )
        return self

    @model_validator(mode="after")
    def _tasks(self) -> Recipe:
        for name in self.tasks:
            get_task(name)
        twice = {t for t in self.tasks if self.tasks.count(t) > 1}
        if twice:
            raise RecipeError(f"task '{twice.pop()}' is named twice: name each task once.")
        for name in self.training.tasks:
            self._require_task(name, "training.tasks")
        for arm, part in self.arms.items():
            if isinstance(part.tasks, int) and part.tasks > len(self.tasks):
                raise RecipeError(
                    f"arms.{arm}.tasks is {part.tasks}, the recipe has {len(self.tasks)} tasks: "
                    "name more tasks, or lower it."
                )
            for name in part.tasks if isinstance(part.tasks, list) else ():
                self._require_task(name, f"arms.{arm}.tasks")
        return self

    @model_validator(mode="after")
    def _size(self) -> Recipe:
        trainings = sum(
            len(self.tasks_of(a)) * len(self.seeds_of(a)) * len(self.learning_rates_of(a))
            for a in self.arms
        )
        total = trainings * sum(len(m.weights) + len(m.choose_from) for m in self.merges)
        if total > _MOST:
            raise RecipeError(
                f"the recipe asks for {total:,} evaluations, more than {_MOST:,}: name fewer arms, "
                "seeds, rates, merges or weights."
            )
        return self

    @model_validator(mode="after")
    def _words(self) -> Recipe:
        if self.form not in FORMS:
            raise unknown_name("form", self.form, FORMS, error=RecipeError)
        if self.form != "text" and "text" in self.model_fields_set:
            raise RecipeError("'text' is for tasks in words: add 'form: text', or leave it out.")
        for name in self.text.templates:
            self._require_task(name, "text.templates")
        for name in self.tasks:
            self.prompt_of(name)  # a template that does not fit its task is refused
        return self

    def prompt_of(self, task: str) -> Prompt | None:
        """How the task that the recipe calls so is asked in words; None for a classifier."""
        if self.form != "text":
            return None
        return prompt_of(get_task(task), self.text.templates.get(task), chat=self.text.chat)

    def _require_task(self, name: str, where: str) -> None:
        if name not in self.tasks:
            raise unknown_name("task", name, self.tasks, where=where, error=RecipeError)

    def tasks_of(self, arm: str) -> list[str]:
        """The tasks an arm trains and merges, in the recipe's order."""
        own = self.arms[arm].tasks
        if own is None or isinstance(own, int):
            return self.tasks[:own]
        return [task for task in self.tasks if task in own]

    def adapter_of(self, arm: str) -> AdapterShape:
        """The shape of an arm's adapters."""
        part = self.arms[arm]
        own = {"rank": part.rank, "alpha": part.alpha, "targets": part.targets}
        return self.adapter.model_copy(update={k: v for k, v in own.items() if v is not None})

    def resources_of(self, kind: str) -> Resources | None:
        """What is said of a kind of step; other trainings take what that of an adapter does."""
        trains = kind in ("convert", DISTILL)
        return self.resources.get(kind) or (self.resources.get("train") if trains else None)

    def all_seeds(self) -> dict[str, Any]:
        """Every seed that a run draws under; None where the run's own, of `runs`, serves."""
        return {
            "runs": {arm: self.seeds_of(arm) for arm in self.arms},
            "data": self.data.seed,
            "statistics": self.statistics.seed,
            "training": self.training.seed,
            "merges": [[merge.method, merge.seed] for merge in self.merges],
        }

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds an arm runs with."""
        return self.arms[arm].seeds or self.seeds

    def learning_rates_of(self, arm: str) -> list[float]:
        """The learning rates an arm may choose from."""
        rates = self.arms[arm].learning_rate
        rates = self.training.learning_rate if rates is None else rates
        return list(rates) if isinstance(rates, list) else [rates]

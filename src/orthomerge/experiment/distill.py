"""A merge of a recipe that is distilled: what it begins from, on which texts, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from orthomerge.errors import RecipeError
from orthomerge.experiment.parts import Part
from orthomerge.io.documents import is_array
from orthomerge.io.files import file_sha256
from orthomerge.io.tables import SUFFIXES
from orthomerge.merging import AUTO, MergeConfig, get_method
from orthomerge.tasks import Row
from orthomerge.training import DistillSettings

OWN, OTHERS = "own", "others"
"""Texts of each task's own training rows, or of all the other tasks' of the arm."""

_T = TypeVar("_T")


def _listed(value: Any) -> Any:
    return value if is_array(value) else [value]


Several = Annotated[list[_T], Field(min_length=1), BeforeValidator(_listed)]
"""One value or a list of them; each is a merge of its own."""
_VARIED = ("texts", "samples", "rank", "steps", "learning_rate")


class Begin(Part):
    """The merge that a distillation begins from, as `merges:` says one.

    Without a weight (null in a list) it is the one of a few that comes nearest to the adapters.
    With `layer_wise` a method that reads moments is done layer after layer, on the inputs that the
    layers merged so far give; `regmean` is RegMean++ then.
    """

    method: str = MergeConfig.method
    weight: Several[float | None] = Field(default_factory=lambda: [None])
    options: dict[str, Any] = Field(default_factory=dict)
    layer_wise: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Begin:
        if self.layer_wise and "moments" not in get_method(self.method).needs:
            raise RecipeError(
                f"'{self.method}' is not merged layer by layer: name a method that reads moments "
                "(regmean, osrm_aware), or leave out 'layer_wise'."
            )
        return self

    @property
    def label(self) -> str:
        """The method with its options."""
        said = [f"{k}={v}" for k, v in sorted(self.options.items())]
        options = ", ".join([*said, *(["layer_wise"] if self.layer_wise else [])])
        return f"{self.method} ({options})" if options else self.method


class Distill(Part):
    """A merge trained, without labels, towards the answers of the adapters that are merged.

    `from` is the merge to begin from. `rank` is the result's: a number, "auto", or null for the
    sum of the adapters' ranks. `samples` texts of each task are drawn under the run's seed (or
    `seed`) from `texts`: "own" for the task's training rows, "others" for the training rows of the
    arm's other tasks, or a file of texts that all tasks read. Where one of `texts`, `samples`,
    `rank`, `steps`, `learning_rate` and the weight of `from` is a list, each combination is a merge
    of its own. All else is as in `DistillSettings`.
    """

    method: Literal["distill"] = "distill"
    source: Begin = Field(default_factory=Begin, alias="from")
    texts: Several[str] = Field(default_factory=lambda: [OWN])
    samples: Several[Annotated[int, Field(gt=1)]] = Field(default_factory=lambda: [100])
    rank: Several[int | str | None] = Field(default_factory=lambda: [None])
    steps: Several[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [DistillSettings.steps]
    )
    learning_rate: Several[float] = Field(default_factory=lambda: [DistillSettings.learning_rate])
    batch_size: int = DistillSettings.batch_size
    hidden: float = DistillSettings.hidden
    warmup: float = DistillSettings.warmup
    held_out: float = DistillSettings.held_out
    evaluate_every: int | None = None
    patience: int | None = None
    max_length: int | None = None
    answer_tokens: int | None = Field(default=None, gt=0)
    seed: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if get_method(self.source.method).per_task:
            raise RecipeError(
                f"'{self.source.method}' leaves an update per task, so there is no merge to "
                "distill from: name another method under 'from'."
            )
        for rank in self.rank:
            if rank not in (None, AUTO) and not (isinstance(rank, int) and rank > 0):
                raise RecipeError(
                    f"rank {rank!r} of a distillation: it is a whole number above 0, '{AUTO}', or "
                    "null for the sum of the adapters' ranks."
                )
        for each in self.each():
            each.settings(0, 1)
            for weight in each.weights:
                each.config(weight, 0)
        return self

    def each(self) -> list[Distill]:
        """One for each combination of the values that are lists; weights stay together."""
        lists = [getattr(self, name) for name in _VARIED]
        chosen = [{n: [v] for n, v in zip(_VARIED, c, strict=True)} for c in product(*lists)]
        return [self.model_copy(update=values) for values in chosen]

    # What every entry of `merges:` says ---------------------------------------------------------

    @property
    def weights(self) -> list[float | None]:
        """The weights of the merge to begin from."""
        return self.source.weight

    @property
    def choose_from(self) -> list[float]:
        """None: a distillation is chosen by its agreement, which needs no labels."""
        return []

    @property
    def arguments(self) -> dict[str, Any]:
        """What a row says of it: the merge it began from, its size, and what is not the default."""
        said = self.model_dump(exclude={"method", "source", *_VARIED}, exclude_defaults=True)
        varied = {name: getattr(self, name)[0] for name in _VARIED}
        for name in ("texts", "learning_rate", "rank"):
            if [varied[name]] == Distill.model_fields[name].get_default(call_default_factory=True):
                del varied[name]
        return {"from": self.source.label, **varied, **said}

    def seed_of(self, run: int) -> int:
        """What a run of the seed `run` draws texts and batches under."""
        return run if self.seed is None else self.seed

    def config(self, weight: float | None, run: int) -> MergeConfig:
        """The merge to begin from, for the library."""
        return MergeConfig(
            self.source.method, weight, seed=self.seed_of(run), options=self.source.options
        )

    @property
    def asks(self) -> tuple[Any, ...]:
        """What the teachers' answers depend on."""
        return self.texts[0], self.samples[0], self.seed, self.max_length, self.answer_tokens

    # What one of them takes ---------------------------------------------------------------------

    def settings(self, run: int, max_length: int) -> DistillSettings:
        """How it is trained in a run of the seed `run`; texts are cut as the recipe's rows are."""
        (steps,), (rate,) = self.steps, self.learning_rate
        return DistillSettings(
            steps=steps, learning_rate=rate, batch_size=self.batch_size, hidden=self.hidden,
            warmup=self.warmup, held_out=self.held_out, evaluate_every=self.evaluate_every,
            patience=self.patience, max_length=self.max_length or max_length,
            seed=self.seed_of(run),
        )  # fmt: skip

    def texts_key(self) -> str:
        """What its texts depend on besides the tasks' rows: a file's hash.

        Raises:
            RecipeError: neither "own", "others" nor a file of texts that is there.
        """
        (source,) = self.texts
        if source in (OWN, OTHERS):
            return source
        if Path(source).suffix not in SUFFIXES or not Path(source).is_file():
            raise RecipeError(
                f"no texts '{source}' to distill on: name '{OWN}', '{OTHERS}' or a file "
                f"({', '.join(SUFFIXES)})."
            )
        return file_sha256(source)

    def draw_from(self, rows: Mapping[str, Sequence[Row]]) -> list[Any]:
        """What `distill_adapters` draws each task's texts from, by the tasks' training rows."""
        (source,) = self.texts
        if source not in (OWN, OTHERS):
            return [source] * len(rows)
        known = {task: [(r.text, r.pair) for r in mine] for task, mine in rows.items()}
        if source == OWN:
            return list(known.values())
        return [[t for k, texts in known.items() if k != own for t in texts] for own in known]

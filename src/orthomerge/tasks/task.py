"""What a task is: fixed pools of labelled rows, and seeded samples drawn from them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orthomerge.errors import TaskError
from orthomerge.io.files import derive_seed, fingerprint

Kind = Literal["classification", "regression"]
Metric = Literal["accuracy", "matthews", "f1", "pearson", "spearman", "pearson_spearman"]


class Row(NamedTuple):
    """One labelled example: a class index for a classification, a number for a regression."""

    text: str
    pair: str | None
    label: int | float


@dataclass(frozen=True)
class TaskData:
    """The rows of one run; `fingerprint` is the hash of all of them in order."""

    train: list[Row]
    selection: list[Row]
    test: list[Row]
    fingerprint: str


@dataclass(frozen=True)
class Task:
    """A named task.

    `pools` gives its rows by split: "train" and "test", and "selection" where the three are kept
    apart by movie or speech; without it the selection rows are drawn from "train". `metric` is the
    main score; `labels` is empty for a regression; `made` says how the rows come about.
    """

    name: str
    title: str
    kind: Kind
    labels: tuple[str, ...]
    metric: Metric
    source: str
    licence: str
    made: str
    pair: bool
    pools: Callable[[], Mapping[str, list[Row]]]

    @property
    def regression(self) -> bool:
        """Whether the task asks for a value."""
        return self.kind == "regression"

    @property
    def outputs(self) -> int:
        """What its head has: an output a class, or one for a value."""
        return 1 if self.regression else len(self.labels)

    def data(
        self,
        *,
        train: int | None = 0,
        selection: int = 0,
        test: int | None = 0,
        seed: int = 0,
        at_most: bool = False,
    ) -> TaskData:
        """A sample of every split, drawn under `seed`; a smaller sample begins a larger one.

        None asks for all rows of a split; with `at_most`, `train` and `test` are bounds.

        Raises:
            TaskError: a split has fewer rows than asked, or the rows carry fewer than two labels.
            AssetError: the data cannot be found.
        """
        pools = {name: list(rows) for name, rows in self.pools().items()}
        wanted = {"train": train, "selection": selection, "test": test}
        shuffled = {split: self._shuffled(pools, split, seed) for split in pools}
        if "selection" not in pools:
            # The tail of the training rows, so that the selection rows do not move with `train`.
            cut = max(len(shuffled["train"]) - selection, 0)
            shuffled["selection"] = shuffled["train"][cut:]
            shuffled["train"] = shuffled["train"][:cut]
        parts: dict[str, list[Row]] = {}
        for split, asked in wanted.items():
            have = len(shuffled[split])
            bound = at_most and split != "selection"
            count = have if asked is None else min(asked, have) if bound else asked
            if count < 0 or have < count:
                raise TaskError(
                    f"task '{self.name}' has {have} {split} rows, not {count}: ask for fewer."
                )
            parts[split] = shuffled[split][:count]
        for split in ("train", "test"):
            if wanted[split] != 0 and len({row.label for row in parts[split]}) < 2:
                raise TaskError(
                    f"the {split} rows of task '{self.name}' carry one label: ask for more rows or "
                    "name another label column."
                )
        return TaskData(**parts, fingerprint=fingerprint(parts))

    def _shuffled(self, pools: Mapping[str, list[Row]], split: str, seed: int) -> list[Row]:
        rows = list(pools[split])
        random.Random(derive_seed(seed, self.name, split)).shuffle(rows)
        return rows


def majority(rows: Sequence[Row], kind: Kind) -> int | float:
    """The best constant answer learnt from `rows`.

    The most frequent class (the lowest index of equals), or the mean of a regression's values.

    Raises:
        TaskError: there are no rows.
    """
    if not rows:
        raise TaskError("there are no rows to take a majority of: ask for some training rows.")
    labels = [row.label for row in rows]
    if kind == "regression":
        return sum(labels) / len(labels)
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))

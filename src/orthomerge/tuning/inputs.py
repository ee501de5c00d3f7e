"""What tuning starts from: adapters, the task and rows of each, and models that carry the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters import (
    Adapter,
    align_adapters,
    base_of,
    read_adapter,
    require_runnable,
)
from orthomerge.adapters.output import distinct_names
from orthomerge.errors import AdapterError, MergeError
from orthomerge.evaluation.classification import load_head
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import agree_on_padding, load_classifier, load_tokenizer
from orthomerge.tasks import Row, Task, get_task


@dataclass(frozen=True)
class TuneTask:
    """One adapter's task: its name, what it is, the rows to tune on, and their hash."""

    task: Task
    rows: list[Row]
    fingerprint: str

    @property
    def regression(self) -> bool:
        """Whether the task asks for a value."""
        return self.task.regression

    @property
    def outputs(self) -> int:
        """How many outputs its head has."""
        return self.task.outputs


@dataclass(frozen=True)
class Inputs:
    """Adapters of one base model, in order, each with its task."""

    adapters: list[Adapter]
    names: list[str]
    tasks: list[TuneTask]
    base: ResolvedModel

    @property
    def layers(self) -> list[str]:
        """The layers' names: the union over the adapters."""
        return list(dict.fromkeys(name for a in self.adapters for name in a.layers))

    def record(self) -> dict[str, Any]:
        """What identifies the inputs, as JSON."""
        return {
            "adapters": [a.sha256 for a in self.adapters],
            "base model": self.base.sha256,
            "tasks": [t.task.name for t in self.tasks],
            "rows": [t.fingerprint for t in self.tasks],
        }


def read_inputs(
    adapters: Sequence[str | Path | Adapter],
    tasks: Sequence[str],
    *,
    base: str | None = None,
    rows: int = 100,
    data_seed: int = 0,
) -> Inputs:
    """Read the adapters, and `rows` selection rows of each one's task: never a test row.

    Args:
        adapters: PEFT folders or adapters read before.
        tasks: the task of each adapter, by name or by file, in their order.
        base: the base model; by default the one the adapters name.
        rows: selection rows per task.
        data_seed: seed of the rows. A task without selection rows of its own gives the tail of its
            training rows, which training under the same seed keeps away from.

    Raises:
        AdapterError: no adapters, unreadable ones, different bases, or one without a head.
        MergeError: tasks that do not match the adapters.
        UnknownNameError, TaskError, AssetError: no such task, rows or base model.
    """
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter folder.")
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    read = align_adapters(read, base=base)
    if len(tasks) != len(read):
        raise MergeError(
            f"{len(tasks)} tasks for {len(read)} adapters: give one --task for each adapter, in "
            "their order."
        )
    for adapter in read:
        _require_head(adapter)
        require_runnable(adapter)
    found = [_tune_task(get_task(name), rows, data_seed) for name in tasks]
    return Inputs(read, distinct_names(read), found, base_of(read[0], base))


def _require_head(adapter: Adapter) -> None:
    kind = adapter.config.get("task_type")
    if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise AdapterError(
            f"'{adapter.called}' is a language model's adapter ({kind}), and weights are searched "
            "by heads alone: choose them in a recipe of 'form: text' by choose_from, or without "
            "labels by 'orthomerge merge --tune statistics'."
        )
    if not adapter.modules:
        raise AdapterError(
            f"adapter '{adapter.path or adapter.name}' carries no head, so its task cannot be "
            "scored: train it with modules_to_save naming the classification head."
        )


def _tune_task(task: Task, rows: int, seed: int) -> TuneTask:
    data = task.data(selection=rows, seed=seed)
    return TuneTask(task, data.selection, data.fingerprint)


def load_with_head(
    base: ResolvedModel,
    tokenizer: Any,
    head: Mapping[str, Tensor],
    outputs: int,
    *,
    regression: bool,
) -> Any:
    """The base with a task's head on top, in eval mode, its weights frozen.

    Raises:
        AdapterError: no head, or one that does not fit.
        AssetError: the base cannot be loaded.
    """
    model = load_classifier(
        base.path_or_id, num_labels=outputs, regression=regression, name=base.name
    )
    load_head(agree_on_padding(model, tokenizer), head)
    return model.eval().requires_grad_(False)


def tokenizer_of(base: ResolvedModel) -> Any:
    """The base model's tokenizer."""
    return load_tokenizer(base.path_or_id)

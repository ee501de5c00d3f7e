"""An adapter's Fisher information on its own task, ready for the merging method `fisher`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters import Adapter, read_adapter
from orthomerge.assets import ResolvedModel
from orthomerge.evaluation import applied
from orthomerge.features import batches
from orthomerge.files import fingerprint
from orthomerge.fisher import FisherMeta, collect_fisher
from orthomerge.models import preferred_device
from orthomerge.tasks import Task, get_task
from orthomerge.tuning.inputs import base_of, load_with_head, tokenizer_of


def adapter_fisher(
    adapter: str | Path | Adapter,
    task: str,
    *,
    base: str | None = None,
    samples: int = 100,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 48,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], FisherMeta]:
    """Fisher information of every layer of an adapter, on training rows of its task.

    The model is base, adapter and the adapter's head; the rows' labels are not looked at.
    Equation, cost and units: `orthomerge.fisher.collect_fisher`.

    Args:
        adapter: a PEFT folder, or an adapter read before.
        task: its task, by name or file.
        base: the base model; by default the one the adapter names.
        samples: training rows, drawn under `seed`.
        progress: called with the number of samples after each batch.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the base, or carries no head.
        UnknownNameError, TaskError, AssetError: no such task, rows or base model.
        StatisticsError: information that is not finite.

    Source: Matena and Raffel 2022, arXiv 2111.09832.
    """
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    about = get_task(task)
    rows = about.data(train=samples, seed=seed).train
    found = base_of(read, base)
    return fisher_on_texts(
        read,
        about,
        [(row.text, row.pair) for row in rows],
        found,
        tokenizer_of(found),
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )


def fisher_on_texts(
    adapter: Adapter,
    task: Task,
    texts: Sequence[tuple[str, str | None]],
    base: ResolvedModel,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 48,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], FisherMeta]:
    """`adapter_fisher` on a sample and a base that are at hand; it raises the same."""
    regression = task.kind == "regression"
    outputs = 1 if regression else len(task.labels)
    model = load_with_head(base, tokenizer, adapter.modules, outputs, regression=regression)
    with applied(model.to(preferred_device()), adapter.layers):
        fisher = collect_fisher(
            model,
            batches(texts, tokenizer, batch_size=batch_size, max_length=max_length),
            list(adapter.layers),
            regression=regression,
            progress=progress,
        )
    meta = FisherMeta(
        model_id=base.name,
        model_sha256=base.sha256,
        adapter_sha256=adapter.sha256 or "",
        task=task.name,
        samples=len(texts),
        data=fingerprint(list(texts)),
    )
    return fisher, meta

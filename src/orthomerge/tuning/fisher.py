"""An adapter's Fisher information on its own task, ready for the merging method `fisher`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from orthomerge.adapters import Adapter, read_adapter
from orthomerge.evaluation import applied
from orthomerge.files import fingerprint
from orthomerge.fisher import FisherMeta, collect_fisher
from orthomerge.tasks import get_task
from orthomerge.tuning.inputs import base_of, encoded_batches, load_with_head, tokenizer_of


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
    regression = about.kind == "regression"
    model = load_with_head(
        found, read.modules, 1 if regression else len(about.labels), regression=regression
    )
    batches = encoded_batches(
        tokenizer_of(found), rows, batch_size=batch_size, max_length=max_length
    )
    with applied(model, read.layers):
        fisher = collect_fisher(
            model, batches, list(read.layers), regression=regression, progress=progress
        )
    meta = FisherMeta(
        model_id=found.name,
        model_sha256=found.sha256,
        adapter_sha256=read.sha256 or "",
        task=about.name,
        samples=len(rows),
        data=fingerprint([(r.text, r.pair) for r in rows]),
    )
    return fisher, meta

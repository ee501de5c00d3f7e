"""A distilled merge written as an ordinary merge, with what it was trained on in its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthomerge.adapters.files import Adapter
from orthomerge.adapters.merge import save_merged
from orthomerge.io.files import atomic_path
from orthomerge.io.names import MERGE
from orthomerge.io.outputs import require_free
from orthomerge.io.rows import DISTILL
from orthomerge.merging import MergeConfig, MergedUpdate
from orthomerge.records import cards, record_of, seal_again

_PAPER = "distillation from the adapters' own answers, after Hinton et al. 2015"


def save_distilled(
    output: str | Path,
    merged: MergedUpdate,
    adapters: Sequence[Adapter],
    config: MergeConfig,
    distilled: Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write distilled factors as a PEFT folder, each task's head beside it, with record and card.

    `config` is of the merge that the training began from; `distilled` is what the record says of
    the training: what it began from, settings, texts, agreement.

    Raises:
        OutputError: an output that is not free, or that contains an adapter or is inside one.
    """
    require_free(output, inputs=adapters, overwrite=overwrite)
    with atomic_path(output) as folder:
        save_merged(folder, merged, adapters, config, names=names)
        more = {"method": DISTILL, "paper": _PAPER, "distilled": dict(distilled)}
        record = {**record_of(folder, MERGE), **more}
        for name, card in cards(record).items():
            (folder / name).write_text(card, encoding="utf-8")
        seal_again(record, folder, MERGE)
    return Path(output)

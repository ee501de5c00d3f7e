"""Adapters in, one adapter out: files around the merging methods."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orthomerge.adapters.files import (
    HEADS,
    Adapter,
    as_factors,
    read_adapter,
    require_same_base,
    write_adapter,
)
from orthomerge.errors import AdapterError
from orthomerge.merging import MergedUpdate, get_method, merge_layers

# The class that has the layers' names, by PEFT's task type.
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def merge_adapters(
    adapters: Sequence[str | Path | Adapter],
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    rank: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    **options: Any,
) -> MergedUpdate:
    """Merge LoRA adapters of one base model, straight from their factors.

    Args:
        adapters: PEFT folders or adapters read before, in the order of `weights`.
        method: a name of `orthomerge methods`.
        weights: one an adapter, one for all, or None for 1.0 each.
        rank: truncate every layer to this rank (best approximation); None keeps what the method
            gives.
        seed: for methods that draw.
        output: write the merged adapter to this folder as well.
        options: of the method, as `density=0.2`.

    Raises:
        AdapterError: fewer than one adapter, different base models, unreadable folders.
        MergeError: weights, shapes or options that do not fit.
        UnknownNameError: no such method.
    """
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter folder.")
    get_method(method)
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    require_same_base(read)
    merged = merge_layers(
        [a.layers for a in read], method=method, weights=weights, seed=seed, rank=rank, **options
    )
    if output is not None:
        values = weights if weights is not None else 1.0
        spread = [float(values)] * len(read) if isinstance(values, int | float) else list(values)
        save_merged(output, merged, read, spread, rank=rank, seed=seed, options=options)
    return merged


def save_merged(
    output: str | Path,
    merged: MergedUpdate,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Write a merged adapter: PEFT folder, model card, `merge.json`, and each task's head.

    Heads are kept per task under `heads/<adapter>.safetensors`: one adapter folder can carry one
    head only, and averaging heads of different tasks has no meaning.
    """
    layers = {name: as_factors(update, rank) for name, update in merged.layers.items()}
    method = get_method(merged.method)
    names = list(names) if names is not None else _distinct_names(adapters)
    record = {
        "method": merged.method,
        "paper": method.paper,
        "options": options or {},
        "seed": seed,
        "rank": rank,
        "truncation_error": merged.truncation_error,
        "base_model": adapters[0].base_model,
        "adapters": [
            {"name": n, "path": str(a.path or a.name), "sha256": a.sha256, "weight": w}
            for n, a, w in zip(names, adapters, weights, strict=True)
        ],
        "versions": {p: version(p) for p in ("orthomerge", "peft", "torch", "transformers")},
    }
    heads = {n: a.modules for n, a in zip(names, adapters, strict=True) if a.modules}
    return write_adapter(
        output,
        layers,
        base_model=adapters[0].base_model,
        extra={"merge.json": record},
        heads=heads,
        readme=_model_card(record, adapters[0].config.get("task_type"), has_heads=bool(heads)),
    )


def _distinct_names(adapters: Sequence[Adapter]) -> list[str]:
    names: list[str] = []
    for adapter in adapters:
        name, number = adapter.name, 2
        while name in names:
            name, number = f"{adapter.name}-{number}", number + 1
        names.append(name)
    return names


def _model_card(record: dict[str, Any], task_type: str | None, *, has_heads: bool) -> str:
    rows = "\n".join(
        f"| {a['name']} | {a['weight']:g} | `{(a['sha256'] or '')[:12]}` |"
        for a in record["adapters"]
    )
    heads = (
        f"\nEach task keeps its own head under `{HEADS}/`; load the one of the task you run.\n"
        if has_heads
        else ""
    )
    base = record["base_model"] or "base-model"
    auto = _AUTO.get(task_type or "", "AutoModel")
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, merged, orthomerge]
---
# Merged LoRA adapter

{len(record["adapters"])} adapters of `{base}` merged with `{record["method"]}`
({record["paper"]}), options `{record["options"]}`, seed {record["seed"]}.

| adapter | weight | sha256 |
| --- | --- | --- |
{rows}
{heads}
```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "path/to/this/folder")
```

Everything that went in is in `merge.json`.
"""

"""What a merged adapter says of itself: the record `merge.json` and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from orthomerge.adapters.files import HEADS, Adapter
from orthomerge.files import fingerprint
from orthomerge.merging import get_method

# The class that has the layers' names, by PEFT's task type.
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def merge_record(
    method: str,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    *,
    base: str | None,
    base_model: str | None,
    statistics: Sequence[Mapping[str, Any]],
    fisher: Sequence[Mapping[str, Any]],
    layer_weights: Mapping[str, Any],
    options: Mapping[str, Any],
    seed: int,
    rank: int | None,
    heads: str,
) -> dict[str, Any]:
    """What went into a merge, as `merge.json` holds it; errors and hashes come later.

    `base` is the base model as the user named it, `base_model` what it is taken for.
    """
    return {
        "method": method,
        "paper": get_method(method).paper,
        "options": dict(options),
        "seed": seed,
        "rank": rank,
        "layer_weights": dict(layer_weights),
        "heads": heads,
        "base": base,
        "base_model": base_model,
        "statistics": list(statistics),
        "fisher": list(fisher),
        "adapters": [
            {**about_adapter(n, a), "weight": w}
            for n, a, w in zip(names, adapters, weights, strict=True)
        ],
        "versions": {p: version(p) for p in ("orthomerge", "peft", "torch", "transformers")},
    }


def about_adapter(name: str, adapter: Adapter) -> dict[str, str | None]:
    """What a record says of an adapter that went in: its name, place and hashes."""
    return {
        "name": name,
        "path": adapter.called,
        "sha256": adapter.sha256,
        "config_sha256": fingerprint(adapter.config),
    }


def model_card(
    record: Mapping[str, Any],
    task_type: str | None,
    notes: Sequence[str],
    *,
    model: bool = False,
) -> str:
    """The README of a merged adapter, or of a whole model; `notes` say what lies beside it."""
    rows = "\n".join(
        f"| {a['name']} | {a['weight']:g} | `{(a['sha256'] or '')[:12]}` |"
        for a in record["adapters"]
    )
    said = "".join(f"\n{note}\n" for note in notes)
    base = record["base_model"] or "base-model"
    auto = _AUTO.get(task_type or "", "AutoModel")
    if model:
        library, tags, title = "transformers", "[merged, orthomerge]", "Merged model"
        load = f"""from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")"""
    else:
        library, tags, title = "peft", "[lora, merged, orthomerge]", "Merged LoRA adapter"
        load = _loading(task_type, base)
    return f"""---
base_model: {base}
library_name: {library}
tags: {tags}
---
# {title}

{len(record["adapters"])} adapters of `{base}` merged with `{record["method"]}`
({record["paper"]}), options `{record["options"]}`, seed {record["seed"]}.

| adapter | weight | sha256 |
| --- | --- | --- |
{rows}
{said}
```python
{load}
```

Everything that went in is in `merge.json`.
"""


def notes_on(heads: str, *, modules: bool, tasks: bool) -> list[str]:
    """What the card says of heads and of the tasks' own adapters."""
    notes: list[str] = []
    if modules and heads == "keep":
        notes.append(
            f"Each task keeps its own head under `{HEADS}/`; load the one of the task you run."
        )
    if modules and heads == "average":
        notes.append("The tasks' heads were averaged; the mean is part of this adapter.")
    if tasks:
        notes.append("Each task's own adapter lies under `tasks/`, with its own head.")
    return notes


def converted_card(record: Mapping[str, Any], task_type: str | None) -> str:
    """The README of a converted adapter."""
    adapter, how, total = record["adapter"], record["config"], record["total"]
    base = record["base_model"] or "base-model"
    lost = total["lost_outputs"]
    kept = (
        "" if lost is None else f" It gave up {lost:.0%} of its outputs on its own task's inputs."
    )
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, converted, orthomerge]
---
# Converted LoRA adapter

`{adapter["name"]}` (sha256 `{(adapter["sha256"] or "")[:12]}`) of `{base}`, converted with subspace
`{how["subspace"]}` so that it answers other tasks' inputs less:
{total["others_hear_still"]:.0%} of what they heard before is left.{kept}

```python
{_loading(task_type, base)}
```

How it was converted, and what each layer lost, is in `convert.json`.
"""


def _loading(task_type: str | None, base: str) -> str:
    auto = _AUTO.get(task_type or "", "AutoModel")
    return f"""from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "path/to/this/folder")"""

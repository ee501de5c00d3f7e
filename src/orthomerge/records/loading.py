"""The Python of a card that loads what the card describes, with its heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.io.names import HEAD, HEADS
from orthomerge.models.packaged import carrying

# The class that has the layers' names, by PEFT's task type, and what the hub calls its task.
AUTO = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text-generation"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
FOLDER = "path/to/this/folder"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def base_name(record: Mapping[str, Any]) -> str:
    """The base's id; of a folder only its name, since its place means nothing elsewhere."""
    base = record["base_model"] or "base-model"
    return base if HUB_ID.fullmatch(base) else re.split(r"[/\\]", base.rstrip("/\\"))[-1]


def heads(record: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    """Each adapter's head as the record has it: the name of its file and its count of labels."""
    return [a.get("head") for a in record["adapters"]]


def loading(record: Mapping[str, Any], *, model: bool) -> str:
    """What to load of a merge's folder, as code, and what its heads are."""
    each = heads(record)
    if own := record.get("own_adapters"):
        return _of_one_task(record, own, each[0])
    kept = [h for h in each if h] if record.get("heads") == "keep" else []
    first = kept[0] if kept else None
    if model:
        said = [_code(_model_lines(record, first))]
    else:
        averaged = None if kept else next((h for h in each if h), None)
        said = [peft_code(record, averaged, beside=first)]
    if kept:
        said.append(_about_heads(kept))
    elif any(each) and record.get("heads") == "average":
        said.append("The tasks' heads were averaged; the mean is part of it.")
    return "\n\n".join(said)


def peft_code(
    record: Mapping[str, Any],
    head: Mapping[str, Any] | None,
    folder: str = FOLDER,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Code that loads an adapter; `head` is in it, `beside` in a file of its own."""
    auto, _ = AUTO.get(record.get("task_type") or "", ("AutoModel", ""))
    named = base_name(record)
    base = json.dumps(named if named == record["base_model"] else f"path/to/{named}")
    # A packaged id that is no id of the hub: Transformers does not know it.
    ours = "/" not in named and carrying(named) is not None
    base = f"resolve_model({base}).path_or_id" if ours else base
    lines = ["from orthomerge.models import resolve_model"] if ours else []
    lines += ["from peft import PeftModel"]
    lines += ["from safetensors.torch import load_file"] if beside else []
    lines += [f"from transformers import {auto}", ""]
    lines.append(f"base = {auto}.from_pretrained({base}{_labels(auto, head or beside)})")
    lines += _head_lines("base", beside, folder)
    lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})")
    return _code(lines)


def _of_one_task(
    record: Mapping[str, Any], own: Sequence[str], head: Mapping[str, Any] | None
) -> str:
    listed = ", ".join(f"`tasks/{name}`" for name in own)
    return (
        f"The method leaves one adapter per task ({listed}), each with its own head if it had "
        "one. Load the one of the task you run; the folder itself holds what all share.\n\n"
        + peft_code(record, head, f"{FOLDER}/tasks/{own[0]}")
    )


def _about_heads(kept: Sequence[Mapping[str, Any]]) -> str:
    listed = ", ".join(
        f"`{HEADS}/{h['name']}{HEAD}`" + (f" ({h['labels']} labels)" if h["labels"] else "")
        for h in kept
    )
    return (
        f"Each task keeps its own head: {listed}. Without one the model answers at random, and "
        "with another's it answers another's question."
    )


def _model_lines(record: Mapping[str, Any], beside: Mapping[str, Any] | None) -> list[str]:
    auto, _ = AUTO.get(record.get("task_type") or "", ("AutoModel", ""))
    lines = ["from safetensors.torch import load_file"] if beside else []
    lines += [f"from transformers import {auto}", ""]
    counted = _labels(auto, beside)
    lines.append(f"model = {auto}.from_pretrained({json.dumps(FOLDER)}{counted})")
    return lines + _head_lines("model", beside, FOLDER)


def _labels(auto: str, head: Mapping[str, Any] | None) -> str:
    """The argument that a head's count of labels makes, if there is one."""
    labels = (head or {}).get("labels")
    return f", num_labels={labels}" if labels and auto != "AutoModel" else ""


def _head_lines(model: str, beside: Mapping[str, Any] | None, folder: str) -> list[str]:
    if beside is None:
        return []
    file = json.dumps(f"{folder}/{HEADS}/{beside['name']}{HEAD}")
    return [f"{model}.load_state_dict(load_file({file}), strict=False)  # the head of one task"]


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])

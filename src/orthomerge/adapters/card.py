"""The model card of a merge or a conversion, worked out from its record alone.

So the card can be written anew when figures are known, and a second merge can be held to the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orthomerge.adapters.clashes import Remark, listed, remarks
from orthomerge.adapters.files import HEAD, HEADS
from orthomerge.adapters.licences import Licence, plain
from orthomerge.adapters.provenance import entries_of

# The class that has the layers' names, by PEFT's task type, and what the hub calls its task.
_AUTO = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text-generation"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def cards(record: Mapping[str, Any]) -> dict[str, str]:
    """Every README of a merge's folder by its place in it: its own, and each task's adapter's."""
    own: list[str] = record.get("own_adapters") or []
    tasks = {f"tasks/{name}/README.md": task_card(record, i) for i, name in enumerate(own)}
    return {"README.md": model_card(record), **tasks}


def model_card(record: Mapping[str, Any]) -> str:
    """The README of a merge's folder, an adapter's or a model's, from `merge.json`."""
    model = record.get("form") == "model"
    title = "Merged model" if model else "Merged LoRA adapter"
    tags = ["merged", "orthomerge"] if model else ["lora", "merged", "orthomerge"]
    parts = [
        _header(record, tags, relation="merge" if model else "adapter"),
        f"# {title}\n\n{_opening(record, model=model)}",
        f"## What went in\n\n{_went_in(record)}",
        f"## What to expect\n\n{_expected(record)}",
        f"## How to load it\n\n{_loading(record, model=model)}",
        f"## Licences\n\n{_licences(record)}",
        "Everything that went in, with hashes of every file, is in `merge.json`; "
        "`orthomerge verify` holds the folder to it.",
    ]
    return "\n\n".join(parts) + "\n"


def task_card(record: Mapping[str, Any], place: int) -> str:
    """The README of one task's own adapter below a merge's folder."""
    name = _name(record["adapters"][place])
    head = _heads(record)[place]
    return (
        f"{_header(record, ['lora', 'merged', 'orthomerge'], relation='adapter')}\n\n"
        f"# Merged LoRA adapter: {name}\n\n"
        f"What the method `{record['method']}` gives the task {name} out of "
        f"{_count(record)}; the folder above says what went in, what to expect, and the licences "
        f"of the parts.\n\n{_code(_peft_lines(record, head, 'path/to/this/folder'))}\n"
    )


def converted_card(record: Mapping[str, Any], task_type: str | None) -> str:
    """The README of a converted adapter, from `convert.json`."""
    (adapter,), how, total = entries_of(record), record["config"], record["total"]
    lost = total["lost_outputs"]
    kept = (
        "" if lost is None else f" It gave up {lost:.0%} of its outputs on its own task's inputs."
    )
    about = {**record, "adapters": [adapter], "task_type": task_type}
    return f"""{_header(about, ["lora", "converted", "orthomerge"], relation="adapter")}

# Converted LoRA adapter

{_name(adapter)} (sha256 `{(adapter["sha256"] or "")[:12]}`) of {_base(record)}, converted with
subspace `{how["subspace"]}` so that it answers other tasks' inputs less:
{total["others_hear_still"]:.0%} of what they heard before is left.{kept}

## How to load it

{_code(_peft_lines(about, None, "path/to/this/folder"))}

## Licences

{_licences(about)}

How it was converted, and what each layer lost, is in `convert.json`.
"""


def _header(record: Mapping[str, Any], tags: Sequence[str], *, relation: str) -> str:
    """The YAML that the hub reads. A base on this machine is no hub's, a licence only if one."""
    base, model = record["base_model"] or "", relation == "merge"
    auto, task = _AUTO.get(record.get("task_type") or "", ("", ""))
    licence = _common(_parts(record).values())
    header = {
        **(
            {"base_model": base, "base_model_relation": relation} if _HUB_ID.fullmatch(base) else {}
        ),
        "library_name": "transformers" if model else "peft",
        **({"license": licence} if licence else {}),
        **({"pipeline_tag": task} if auto else {}),
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


# ---------------------------------------------------------------------------------------------
# What went in


def _opening(record: Mapping[str, Any], *, model: bool) -> str:
    names = ", ".join(_name(a) for a in record["adapters"])
    what = (
        f"The base model {_base(record)} with {_count(record)} ({names}) merged into it."
        if model
        else f"One adapter in the place of {_count(record)} ({names}) of the base model "
        f"{_base(record)}."
    )
    return f"{what} Merged with orthomerge's `{record['method']}` ({record['paper']})."


def _went_in(record: Mapping[str, Any]) -> str:
    rows = [
        f"| {_name(a)} | {a['weight']:g} | {_from(a)} | {_licence(a).said} | "
        f"`{(a['sha256'] or '')[:12]}` |"
        for a in record["adapters"]
    ]
    table = ["| adapter | weight | from | licence | sha256 |", "| --- | ---: | --- | --- | --- |"]
    how = [f"seed {record['seed']}"]
    how += [f"{key} {_value(value)}" for key, value in record["options"].items() if key != "rank"]
    if record.get("layer_weights"):
        how.append("other weights for some layers (see `merge.json`)")
    for what, called in (("statistics", "statistics"), ("fisher", "Fisher information")):
        if record.get(what):
            how.append(f"{called} of each task")
    if record.get("rank"):
        errors: dict[str, float] = record.get("truncation_error") or {}
        worst = max(errors.values(), default=0.0)
        how.append(f"cut to rank {record['rank']}, which took at most {worst:.1%} of a layer")
    return "\n".join([*table, *rows, "", f"With {', '.join(how)}."])


def _from(adapter: Mapping[str, Any]) -> str:
    """The hub's page of a part that came from there; a place on this machine is nobody's else."""
    identity, _, commit = (adapter.get("path") or "").partition("@")
    if not commit or not _HUB_ID.fullmatch(identity) or not commit.isalnum():
        return "a local folder"
    return f"[{identity}](https://huggingface.co/{identity}/tree/{commit})"


def _value(value: Any) -> str:
    return plain(json.dumps(value, default=str))


def _count(record: Mapping[str, Any]) -> str:
    count = len(record["adapters"])
    return f"{count} LoRA adapter{'' if count == 1 else 's'}"


def _name(adapter: Mapping[str, Any]) -> str:
    return f"`{plain(str(adapter['name']))}`"


def _base(record: Mapping[str, Any]) -> str:
    return f"`{plain(_base_name(record))}`" if record["base_model"] else "(which they do not name)"


def _base_name(record: Mapping[str, Any]) -> str:
    """The base's id; of a folder only its name, since its place means nothing elsewhere."""
    base = record["base_model"] or "base-model"
    return base if _HUB_ID.fullmatch(base) else re.split(r"[/\\]", base.rstrip("/\\"))[-1]


# ---------------------------------------------------------------------------------------------
# What to expect


def _expected(record: Mapping[str, Any]) -> str:
    figures: list[dict[str, Any]] = record.get("figures") or []
    if not figures:
        return (
            "Not measured yet. `orthomerge eval FOLDER --task TASK --card` scores a task and "
            "writes the figure here; `orthomerge card` takes what was scored before."
        )
    rows = [
        f"| {plain(f['task'])} | {plain(f['metric'])} | **{f['value']:.3f}** | "
        f"{_figure(f.get('alone'))} | {_figure(f.get('majority'))} | {f['n']} |"
        for f in figures
    ]
    table = [
        "| task | measure | this merge | the task's own adapter | a constant answer | rows |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    measured = listed(sorted({plain(f["by"]) for f in figures}))
    note = f"Measured by {measured}, on rows kept for tests."
    return "\n".join([*table, *rows, "", note])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------------------------------
# How to load it


def _loading(record: Mapping[str, Any], *, model: bool) -> str:
    heads = _heads(record)
    own: list[str] = record.get("own_adapters") or []
    kept = [h for h in heads if h] if record.get("heads") == "keep" else []
    said: list[str] = []
    if own:
        listed = ", ".join(f"`tasks/{name}`" for name in own)
        said.append(
            f"The method leaves an adapter a task ({listed}), each with its own head if it had "
            "one. Load the one of the task you run; the folder itself holds what all share."
        )
        said.append(_code(_peft_lines(record, heads[0], f"path/to/this/folder/tasks/{own[0]}")))
        return "\n\n".join(said)
    first = kept[0] if kept else None
    if model:
        said.append(_code(_model_lines(record, first)))
    else:
        said.append(_code(_peft_lines(record, None if kept else _averaged(record),
                                      "path/to/this/folder", first)))  # fmt: skip
    if kept:
        said.append(_about_heads(kept))
    elif any(heads) and record.get("heads") == "average":
        said.append("The tasks' heads were averaged; the mean is part of it.")
    return "\n\n".join(said)


def _averaged(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((h for h in _heads(record) if h), None)


def _about_heads(kept: Sequence[Mapping[str, Any]]) -> str:
    listed = ", ".join(
        f"`{HEADS}/{h['name']}{HEAD}`" + (f" ({h['labels']} labels)" if h["labels"] else "")
        for h in kept
    )
    return (
        f"Each task keeps its own head: {listed}. Without one the model answers at random, and "
        "with another's it answers another's question."
    )


def _peft_lines(
    record: Mapping[str, Any],
    head: Mapping[str, Any] | None,
    folder: str,
    beside: Mapping[str, Any] | None = None,
) -> list[str]:
    """Python that loads an adapter; `head` is in it, `beside` in a file of its own."""
    auto, _ = _AUTO.get(record.get("task_type") or "", ("AutoModel", ""))
    named = _base_name(record)
    base = json.dumps(named if named == record["base_model"] else f"path/to/{named}")
    lines = ["from peft import PeftModel"]
    lines += ["from safetensors.torch import load_file"] if beside else []
    lines += [f"from transformers import {auto}", ""]
    lines.append(f"base = {auto}.from_pretrained({base}{_labels(auto, head or beside)})")
    lines += _head_lines("base", beside, folder)
    lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})")
    return lines


def _model_lines(record: Mapping[str, Any], beside: Mapping[str, Any] | None) -> list[str]:
    auto, _ = _AUTO.get(record.get("task_type") or "", ("AutoModel", ""))
    folder = "path/to/this/folder"
    lines = ["from safetensors.torch import load_file"] if beside else []
    lines += [f"from transformers import {auto}", ""]
    counted = _labels(auto, beside)
    lines.append(f"model = {auto}.from_pretrained({json.dumps(folder)}{counted})")
    return lines + _head_lines("model", beside, folder)


def _labels(auto: str, head: Mapping[str, Any] | None) -> str:
    """The argument that a head's count of labels makes, if there is one."""
    labels = (head or {}).get("labels")
    return f", num_labels={labels}" if labels and auto != "AutoModel" else ""


def _head_lines(model: str, beside: Mapping[str, Any] | None, folder: str) -> list[str]:
    if beside is None:
        return []
    file = json.dumps(f"{folder}/{HEADS}/{beside['name']}{HEAD}")
    return [f"{model}.load_state_dict(load_file({file}), strict=False)  # the head of one task"]


def _heads(record: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    """Each adapter's head as the record has it: the name of its file and its count of labels."""
    return [a.get("head") for a in record["adapters"]]


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


# ---------------------------------------------------------------------------------------------
# Licences


def _parts(record: Mapping[str, Any]) -> dict[str, Licence]:
    """The licence of every part by what the card calls it."""
    base: Mapping[str, Any] = record.get("base_licence") or {}
    found = {"the base model": _licence({"licence": base})}
    return found | {_name(a): _licence(a) for a in record["adapters"]}


def _licence(entry: Mapping[str, Any]) -> Licence:
    stated: Mapping[str, Any] = entry.get("licence") or {}
    return Licence(stated.get("id"), stated.get("where") or "", stated.get("name"))


def _common(licences: Any) -> str | None:
    """The one licence that all parts state, if they do."""
    found = {licence.id for licence in licences}
    return found.pop() if len(found) == 1 and None not in found and "other" not in found else None


def licence_remarks(record: Mapping[str, Any]) -> list[Remark]:
    """What there is to know of the parts' licences together, clashes first."""
    return remarks(_parts(record))


def _licences(record: Mapping[str, Any]) -> str:
    parts = _parts(record)
    rows = [f"| {part} | {lic.said} | {lic.where or '–'} |" for part, lic in parts.items()]
    found = remarks(parts)
    said = [f"- **{'Clash' if r.kind == 'clash' else 'Note'}**: {r.text}" for r in found]
    if not found:
        said = [f"All parts state `{_common(parts.values()) or 'permissive licences'}`."]
    return "\n".join(
        [
            "| part | licence | where it says so |",
            "| --- | --- | --- |",
            *rows,
            "",
            *said,
            "",
            "This is what the parts say of themselves, read by a program, with what such licences "
            "commonly ask. It is no legal advice; their texts decide.",
        ]
    )

"""The model card of a merge or a conversion, made from its record alone.

So the card can be written anew when scores are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orthomerge.io.names import CARD, TASKS
from orthomerge.merging import FULL, SUM
from orthomerge.records.inputs import entries_of
from orthomerge.records.licences import Licence, licence_of, plain
from orthomerge.records.loading import AUTO, HUB_ID, base_name, heads, loading, peft_code


def cards(record: Mapping[str, Any]) -> dict[str, str]:
    """Every README of a merge's folder by its place in it: its own, and each task's adapter's."""
    own: list[str] = record.get("own_adapters") or []
    tasks = {f"{TASKS}/{name}/{CARD}": task_card(record, i) for i, name in enumerate(own)}
    return {CARD: model_card(record), **tasks}


def model_card(record: Mapping[str, Any]) -> str:
    """The README of a merge's folder, an adapter's or a model's, from `merge.json`."""
    model = record.get("form") == "model"
    title = "Merged model" if model else "Merged LoRA adapter"
    tags = ["merged", "orthomerge"] if model else ["lora", "merged", "orthomerge"]
    parts = [
        f"# {title}\n\n{_opening(record, model=model)}",
        f"## What went in\n\n{_went_in(record)}",
        f"## What to expect\n\n{_expected(record)}",
        f"## How to load it\n\n{loading(record, model=model)}",
        f"## Licences\n\n{_licences(record)}",
        "Everything that went in, with hashes of every file, is in `merge.json`; "
        "`orthomerge verify` holds the folder to it.",
    ]
    relation = "merge" if model else "adapter"
    return _card(record, tags, "\n\n".join(parts), relation=relation)


def task_card(record: Mapping[str, Any], place: int) -> str:
    """The README of one task's own adapter below a merge's folder."""
    name = _name(record["adapters"][place])
    head = heads(record)[place]
    text = (
        f"# Merged LoRA adapter: {name}\n\n"
        f"What the method `{record['method']}` gives the task {name} out of "
        f"{_count(record)}; the folder above says what went in, what to expect, and the licences "
        f"of the parts.\n\n{peft_code(record, head)}"
    )
    return _card(record, ["lora", "merged", "orthomerge"], text, relation="adapter")


def converted_card(record: Mapping[str, Any], task_type: str | None) -> str:
    """The README of a converted adapter, from `convert.json`."""
    (adapter,), how, total = entries_of(record), record["config"], record["total"]
    lost = total["lost_outputs"]
    kept = (
        "" if lost is None else f" It gave up {lost:.0%} of its outputs on its own task's inputs."
    )
    about = {**record, "adapters": [adapter], "task_type": task_type}
    text = f"""# Converted LoRA adapter

{_name(adapter)} (sha256 `{(adapter["sha256"] or "")[:12]}`) of {_base(record)}, converted with
subspace `{how["subspace"]}` so that it answers other tasks' inputs less:
{total["others_hear_still"]:.0%} of what they heard before is left.{kept}

## How to load it

{peft_code(about, None)}

## Licences

{_licences(about)}

How it was converted, and what each layer lost, is in `convert.json`."""
    return _card(about, ["lora", "converted", "orthomerge"], text, relation="adapter")


def trained_card(record: Mapping[str, Any], base: str | None, task_type: str | None) -> str:
    """The README of an adapter that was trained, from `training.json`."""
    task = plain(str(record.get("task") or "one task"))
    labels: list[str] = record.get("labels") or []
    losses, constant = [value for _, value in record["losses"]], record["constant_loss"]
    about = {
        "base_model": base,
        "task_type": task_type,
        "base_licence": licence_of(base)._asdict(),
        "adapters": [{"name": "the adapter", "sha256": None}],
    }
    head = {"labels": len(labels) or 1} if task_type == "SEQ_CLS" and "labels" in record else None
    rows = f" on {record['rows']} rows" if "rows" in record else ""
    parts = [
        f"# LoRA adapter: {task}\n\nFor {_base(about)}, trained for the task {task}{rows}, "
        f"constraint `{record['constraint']}`. The loss went from {losses[0]:.3f} to "
        f"{losses[-1]:.3f}; a constant answer has {constant:.3f}.",
        f"## How it is asked\n\n{_asking(record, labels)}",
        f"## How to load it\n\n{peft_code(about, head)}",
        f"## Licences\n\n{_licences(about)}",
        "All that is known of its training, with hashes of every file, is in `training.json`.",
    ]
    return _card(about, ["lora", "orthomerge"], "\n\n".join(parts), relation="adapter")


def _asking(record: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The prompt and its answers, or the labels of a head."""
    length = f"Texts are cut so that all is no longer than {record['max_length']} tokens."
    prompt: Mapping[str, Any] | None = record.get("prompt")
    if not prompt:
        named = f"Its labels, in the order of the outputs: {plain(', '.join(labels))}. "
        return (named if labels else "") + length
    chat = ", as a user's message in the model's chat template" if prompt.get("chat") else ""
    answers = ", ".join(f"`{plain(answer)}`" for answer in prompt["answers"]) or "a number"
    return (
        f"With this prompt{chat}:\n\n````text\n{prompt['prompt']}\n````\n\n"
        f"It answers {answers}. {length}"
    )


def _card(record: Mapping[str, Any], tags: Sequence[str], text: str, *, relation: str) -> str:
    """A card with the header that the hub reads, as its `ModelCard` writes it.

    A base on this machine is no model of the hub, and a licence is one only if all parts state it.
    """
    base, model = record["base_model"] or "", relation == "merge"
    auto, task = AUTO.get(record.get("task_type") or "", ("", ""))
    on_hub = HUB_ID.fullmatch(base) is not None
    stated = {
        "base_model": base if on_hub else None,
        "library_name": "transformers" if model else "peft",
        "license": _common(_parts(record).values()),
        "pipeline_tag": task if auto else None,
        "tags": list(tags),
        "base_model_relation": relation if on_hub else None,
    }
    header = {key: value for key, value in stated.items() if value is not None}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"


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
    how += _cut(record)
    reason = record.get("weights_reason")
    why = f" The weight is {plain(str(reason), 200)}." if reason else ""
    return "\n".join([*table, *rows, "", f"With {', '.join(how)}.{why}"])


def _cut(record: Mapping[str, Any]) -> list[str]:
    """What the rank took, where it took something."""
    rank = record.get("rank")
    errors: dict[str, float] = record.get("truncation_error") or {}
    if rank in (None, FULL) or (rank == SUM and not errors):
        return []
    to = "the sum of the adapters' ranks" if rank == SUM else f"rank {rank}"
    if energy := record.get("energy"):
        to = f"the rank that keeps {energy:.6g} of a layer's energy"
    return [f"cut to {to}, which took at most {max(errors.values(), default=0.0):.1%} of a layer"]


def _from(adapter: Mapping[str, Any]) -> str:
    """The hub's page of a part that came from there; a place on this machine is nobody's else."""
    identity, _, commit = (adapter.get("path") or "").partition("@")
    if not commit or not HUB_ID.fullmatch(identity) or not commit.isalnum():
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
    return f"`{plain(base_name(record))}`" if record["base_model"] else "(which they do not name)"


# ---------------------------------------------------------------------------------------------
# What to expect


def _expected(record: Mapping[str, Any]) -> str:
    figures: list[dict[str, Any]] = record.get("figures") or []
    if not figures and record.get("distilled"):
        return _agreement(record["distilled"])
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
    measured = " and ".join(sorted({plain(f["by"]) for f in figures}))
    note = f"Measured by {measured}, on rows kept for tests."
    return "\n".join([*table, *rows, "", note])


def _agreement(distilled: Mapping[str, Any]) -> str:
    """How near a distilled merge came to each adapter's own answers."""
    measured: list[dict[str, Any]] = distilled["measured"]
    best = next(m for m in measured if m["step"] == distilled["best"])
    rows = [
        f"| {plain(task)} | {measured[0]['agreement'][task]:.3f} | **{value:.3f}** |"
        for task, value in best["agreement"].items()
    ]
    table = ["| task | agreement before | after |", "| --- | ---: | ---: |"]
    note = (
        "Agreement with the task's own adapter on texts held out: the share of equal answers, or "
        "the correlation of values. Scores on labelled rows: `orthomerge eval FOLDER --task TASK "
        "--card`."
    )
    return "\n".join([*table, *rows, "", note])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


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


def _licences(record: Mapping[str, Any]) -> str:
    rows = [f"| {part} | {lic.said} | {lic.where or '–'} |" for part, lic in _parts(record).items()]
    return "\n".join(
        [
            "| part | licence | where it says so |",
            "| --- | --- | --- |",
            *rows,
            "",
            "This is what the parts say of themselves, read by a program; their texts decide.",
        ]
    )

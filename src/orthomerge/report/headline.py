"""What the numbers of a run say, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping

from orthomerge.report.tables import PLAIN, Arm, Score, Summary, percent


def headline(summary: Summary, runs: Mapping[str, str] | None = None) -> list[str]:
    """What the numbers say, in one to three plain sentences; names stand in backquotes.

    It sets the arm with the best merge against PEFT's own start, or else against the next best;
    where `runs` names the run of each arm, against the best of another run.
    """
    tasks = len(summary.tasks)
    column = summary.plain
    if column is None:
        alone = [
            (s.mean, a, s) for a in summary.arms if (s := summary.cell(a, summary.single).score)
        ]
        if not alone:
            return ["No arm has been scored on every task yet."]
        _, arm, score = max(alone, key=lambda item: item[0])
        return [f"No merge scored yet. Alone, the adapters of {_quoted(arm.name)} score {score}."]
    found = [(a, s) for a in summary.arms if (s := summary.cell(a, column).score)]
    if not found:
        return [f"No arm has been scored on all {tasks} tasks after merging yet."]
    found.sort(key=lambda item: -item[1].mean)
    shown = found[:1] + _other(found, runs or {})

    plain = column.method == PLAIN and not column.options
    what = "The plain sum of" if plain else f"{_quoted(column.group)} over"
    what += f" {tasks} adapter{'' if tasks == 1 else 's'}"
    if column.weight not in (None, 1.0):
        what += f" at weight {column.weight:g}"
    names = [_quoted(arm.name) for arm, _ in shown]
    shares = [summary.cell(arm, column).retained for arm, _ in shown]
    alone = [summary.cell(arm, summary.single).score for arm, _ in shown]
    if any(share is None for share in shares):
        parts = [f"{s} with {name}" for (_, s), name in zip(shown, names, strict=True)]
        sentences = [f"{what} scores {', '.join(parts)}."]
    else:
        kept = [f"{percent(share)} %" for share in shares if share is not None]
        first = f"{what} keeps {kept[0]} of the single-task score with {names[0]}"
        second = f"In points: {shown[0][1]} merged against {alone[0]} alone"
        if len(shown) == 2:
            first += f", {kept[1]} with {names[1]}"
            second += f", and {shown[1][1]} against {alone[1]}"
        sentences = [f"{first}.", f"{second}."]
    if len(shown) == 2:
        (_, top), (_, other) = shown
        if top.spread is None or other.spread is None:
            sentences.append("One seed: how far this varies between seeds is not known.")
        elif top.mean - other.mean <= top.spread + other.spread:
            sentences.append("The difference lies within the spread over seeds.")
    return sentences


def _other(found: list[tuple[Arm, Score]], runs: Mapping[str, str]) -> list[tuple[Arm, Score]]:
    """What the best, the first of `found`, is set against: none where it is the only one."""
    first, rest = found[0][0], found[1:]
    elsewhere = [item for item in rest if runs.get(item[0].name) != runs.get(first.name)]
    named = [item for item in rest if item[0].name == "default"]
    plain = [item for item in rest if item[0].start == "default"]
    return (elsewhere or named or plain or rest)[:1]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "'") + "`"

"""What the numbers of a run say, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping

from orthomerge.report.summary import PLAIN, ArmSummary, Column, Score, Summary, percent


def headline(summary: Summary, runs: Mapping[str, str] | None = None) -> list[str]:
    """What the numbers say, in one to three plain sentences; names stand in backquotes.

    It sets the arm with the best merge against PEFT's own start, or else against the next best;
    where `runs` names the run of each arm, against the best of another run.
    """
    column = summary.plain
    if column is None:
        return [_alone(summary)]
    found = [(a, s) for a in summary.arms if (s := summary.cell(a, column).score)]
    if not found:
        return [f"No arm has been scored on all {len(summary.tasks)} tasks after merging yet."]
    found.sort(key=lambda item: -item[1].mean)
    shown = found[:1] + _other(found, runs or {})
    sentences = _kept(summary, column, shown) + _constant(summary, [arm for arm, _ in shown])
    if len(shown) == 2:
        (_, top), (_, other) = shown
        if top.spread is None or other.spread is None:
            sentences.append("One seed: how far this varies between seeds is not known.")
        elif top.mean - other.mean <= top.spread + other.spread:
            sentences.append("The difference is within the spread over seeds.")
    return sentences


def _alone(summary: Summary) -> str:
    """The best arm's own adapters, where no merge is scored."""
    alone = [(a, s) for a in summary.arms if (s := summary.cell(a, summary.single).score)]
    if not alone:
        return "No arm has been scored on every task yet."
    arm, score = max(alone, key=lambda item: item[1].mean)
    return f"No merge scored yet. Alone, the adapters of {_quoted(arm.name)} score {score}."


def _kept(summary: Summary, column: Column, shown: list[tuple[ArmSummary, Score]]) -> list[str]:
    """What one or two arms keep of their single-task scores, else what they score."""
    what = _merge(column, len(summary.tasks))
    names = [_quoted(arm.name) for arm, _ in shown]
    shares = [summary.cell(arm, column).retained for arm, _ in shown]
    alone = [summary.cell(arm, summary.single).score for arm, _ in shown]
    if any(share is None for share in shares):
        parts = [f"{s} with {name}" for (_, s), name in zip(shown, names, strict=True)]
        return [f"{what} scores {', '.join(parts)}."]
    kept = [f"{percent(share)} %" for share in shares if share is not None]
    first = f"{what} keeps {kept[0]} of the single-task score with {names[0]}"
    second = f"In points: {shown[0][1]} merged against {alone[0]} alone"
    if len(shown) == 2:
        first += f", {kept[1]} with {names[1]}"
        second += f", and {shown[1][1]} against {alone[1]}"
    return [f"{first}.", f"{second}."]


def _constant(summary: Summary, arms: list[ArmSummary]) -> list[str]:
    """A sentence for each arm that has single adapters no better than a constant answer."""
    found: list[str] = []
    for arm in arms:
        scores = {t: summary.per_task.get((arm.name, summary.single, t)) for t in summary.tasks}
        known = {t: s.mean for t, s in scores.items() if s is not None and t in summary.majority}
        lost = [t for t, value in known.items() if value <= summary.majority[t]]
        if lost:
            found.append(
                f"With {_quoted(arm.name)} the single adapter is no better than a constant answer "
                f"on {', '.join(map(_quoted, lost))}: it learnt nothing that a merge could keep."
            )
    return found


def _merge(column: Column, adapters: int) -> str:
    """The merge in words, as the beginning of a sentence."""
    plain = column.method == PLAIN and not column.options
    what = "The plain sum of" if plain else f"{_quoted(column.group)} over"
    what += f" {adapters} adapter{'' if adapters == 1 else 's'}"
    return what if column.weight in (None, 1.0) else f"{what} at weight {column.weight:g}"


def _other(
    found: list[tuple[ArmSummary, Score]], runs: Mapping[str, str]
) -> list[tuple[ArmSummary, Score]]:
    """What the best, the first of `found`, is set against: none where it is the only one."""
    first, rest = found[0][0], found[1:]
    elsewhere = [item for item in rest if runs.get(item[0].name) != runs.get(first.name)]
    named = [item for item in rest if item[0].name == "default"]
    plain = [item for item in rest if item[0].start == "default"]
    return (elsewhere or named or plain or rest)[:1]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "'") + "`"

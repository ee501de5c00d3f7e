"""Write `docs/methods.md` from the registry, the study's rows and the times of one layer.

python -m benchmarks.methods

The rows are those of the recipe which-method (`results/which-method/results.jsonl`); times and
memory are `benchmarks/results/merging-methods.json`. What is not there yet is said on the page.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.io.rows import read_rows
from orthomerge.merging import MergeMethod, get_method, list_methods
from orthomerge.report.methods import DEFAULT_ARM, MethodLine, MethodTable, Outcome, method_table
from orthomerge.report.methods_written import caption, grid, weights_text
from orthomerge.report.summary import percent
from orthomerge.report.written import markdown_grid

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
ROWS = ROOT / "results" / "which-method" / "results.jsonl"
TIMES = ROOT / "benchmarks" / "results" / "merging-methods.json"

_INTRO = """# Merging methods

Written by `python -m benchmarks.methods` from the study's rows and the methods' own descriptions.
How to merge is in [merging.md](merging.md); `orthomerge list methods` prints this list.
"""
_STUDY = """The study is the recipe `which-method`: the eight offline tasks on MiniLM, adapters of
rank 8 on query and value. Arms: `default` is PEFT's own start, `osrm` the paper's start with A
trained, `osrm-frozen` the same with A held, `contrastive-project` our default (A projected out
of the others' dominant directions), which ran on a GPU (see LOG.md), the others on a CPU. Three
weights were tried for every method: 1 and two of the recipe's. Where the chosen weight is an end
of these
three, a better one may lie beyond it. Some defaults have changed since; the rows are of the old
ones: `emr` with `rescale=layer`, `wudi` with `ridge=0.01`, `regmean` with `ridge=1e-6`, and
`robust_merge` with `lambda=1.4142` and `att_ratio=1`."""
_ONE_BY_ONE = """## The methods one by one

There are N adapters of ranks `r_i`, R = Σ r_i; `ΔW_i` is an adapter's update with its scaling,
`w_i` its weight, λ the option `lambda`. Options are given as `--option density=0.2`.
"""
_NEEDS = {
    "moments": "each task's statistics (`--stats`)",
    "fisher": "each adapter's Fisher information (`--fisher`)",
}
# What the study leaves out, and why.
_OUTSIDE = {
    "slerp": "it merges two adapters alone",
    "compose": "its parts are there under their own names",
}


def page(rows: Path = ROWS, times: Path = TIMES) -> str:
    """The whole page."""
    methods = [m for m in list_methods() if m.function.__module__.startswith("orthomerge.")]
    measured = _times(times)
    parts = [_INTRO, "## Which method when\n"]
    if rows.is_file():
        apart = [m.name for m in methods if m.per_task]
        table = method_table(read_rows(rows), per_task=apart)
        needs = {name: m.needs for m in methods for name in (m.name, *m.aliases)}
        parts += [_bullets(advice(table, needs)), _STUDY + "\n"]
        parts += ["## Every method\n", caption(table) + "\n", *_tables(table, measured)]
        if table.notices:
            parts.append(_bullets(table.notices))
        parts.append(_outside(methods, table))
    else:
        parts.append(
            "The study (`orthomerge run recipes/which-method.yaml --output results/which-method`) "
            "has no rows here yet, so nothing is said about which method is better.\n"
        )
    parts.append(_measured_note(times))
    parts.append(_ONE_BY_ONE)
    parts += [_section(m, measured.get(m.name)) for m in methods]
    return "\n".join(parts).rstrip("\n") + "\n"


# ---------------------------------------------------------------------------------------------
# Which method when: every sentence is a function of the figures


def advice(table: MethodTable, needs: Mapping[str, Iterable[str]]) -> list[str]:
    """What the rows say, and no more; a method counts on an arm where all its seeds are whole."""
    arm = DEFAULT_ARM if DEFAULT_ARM in table.arms else next(iter(table.arms), "")
    found = [_sum(table, arm)]
    free = [line for line in _whole(table, arm) if not needs.get(line.method)]
    given = [line for line in _whole(table, arm) if needs.get(line.method)]
    found.append(_leader(table, arm, free, "Of the methods that need the adapters alone,"))
    found.append(_leader(table, arm, given, "With each task's statistics or Fisher information,"))
    found.append(_groups(table, arm))
    found.append(_untuned(table, arm))
    found.append(_masks(table, arm))
    for other in table.arms:
        if other != arm:
            start = f"On `{other}` adapters ({table.singles[other].score} alone)"
            found.append(_leader(table, other, _whole(table, other), start))
    found.append(_limits(table, arm))
    return [text for text in found if text]


def _whole(table: MethodTable, arm: str) -> list[MethodLine]:
    """The methods with a best weight in every seed that the adapters alone have, best first."""
    seeds = set(table.singles[arm].scores) if arm in table.singles else set()
    whole = [line for line in table.shared if seeds and set(line.cell(arm).best.scores) == seeds]
    return sorted(whole, key=lambda line: -_mean(line.cell(arm).best))


def _mean(outcome: Outcome) -> float:
    return statistics.fmean(outcome.scores.values())


def _said(outcome: Outcome) -> str:
    """A score with what it keeps, as "64.3 ± 2.4 (83 %)"."""
    kept = outcome.retained
    return str(outcome.score) + (f" ({100 * kept.mean:.0f} %)" if kept is not None else "")


def _sum(table: MethodTable, arm: str) -> str:
    line = table.plain
    if line is None or line not in _whole(table, arm):
        return ""
    cell, alone = line.cell(arm), table.singles[arm]
    return (
        f"On `{arm}` adapters the plain sum (`task_arithmetic`) scores {_said(cell.published)} at "
        f"weight 1 and {_said(cell.best)} at its best weight ({weights_text(cell.best)}); the "
        f"adapters alone score {alone.score}."
    )


def _leader(table: MethodTable, arm: str, lines: list[MethodLine], start: str) -> str:
    """The highest of `lines` at their best weights, and whether that is more than spread."""
    if not lines:
        return ""
    top = lines[0]
    best = top.cell(arm).best
    text = f"{start} `{top.label}` scores highest: {_said(best)} at weight {weights_text(best)}"
    if top is table.plain:
        return f"{text}; that is the plain sum."
    if table.plain not in _whole(table, arm):
        return f"{text}."
    return f"{text}; {_verdict(table, top, arm)}."


def _verdict(table: MethodTable, line: MethodLine, arm: str) -> str:
    difference = table.against_plain(line, arm)
    assert difference is not None
    points = f"{percent(abs(difference.mean))} points"
    side = "above" if difference.mean > 0 else "below"
    seeds = len(difference.by_seed)
    if seeds == 1:
        return f"{points} {side} the plain sum on one seed, which carries no claim"
    if difference.clear:
        return (
            f"{points} {side} the plain sum, in each of {seeds} seeds and by more than its spread"
        )
    return f"{points} {side} the plain sum, a difference that {seeds} seeds do not carry"


def _groups(table: MethodTable, arm: str) -> str:
    """Who is clearly above the plain sum, who clearly below, and who is close to it."""
    whole = _whole(table, arm)
    if table.plain not in whole or len(table.singles[arm].scores) < 2:
        return ""
    above, within, below = [], [], []
    for line in whole:
        difference = table.against_plain(line, arm)
        if line is table.plain or difference is None:
            continue
        side = within if not difference.clear else above if difference.mean > 0 else below
        side.append(f"`{line.label}`")
    return (
        "At the best weight, in every seed and by more than the plain sum's spread, "
        f"{_listed(above)} {_are(above)} above it and {_listed(below)} {_are(below)} below it; "
        f"{_listed(within)} {_are(within)} not distinguishable from it."
    )


def _untuned(table: MethodTable, arm: str) -> str:
    """Without a weight to choose: the highest as published, against the sum tuned and untuned."""
    whole = _whole(table, arm)
    if table.plain not in whole:
        return ""
    top = max(whole, key=lambda line: _mean(line.cell(arm).published))
    plain = table.plain.cell(arm)
    mine = top.cell(arm).published
    if top is table.plain:
        return "With nothing tuned, no method scores higher than the plain sum at weight 1."
    more = _mean(mine) - _mean(plain.best)
    tuned = plain.best.score
    spread = f" (spread {percent(tuned.spread)})" if tuned and tuned.spread is not None else ""
    return (
        f"With nothing tuned, `{top.label}` scores highest: {_said(mine)}, where the plain sum at "
        f"weight 1 scores {_said(plain.published)}. That is {percent(abs(more))} points "
        f"{'more' if more > 0 else 'less'} than the plain sum at its best weight{spread}."
    )


def _masks(table: MethodTable, arm: str) -> str:
    seeds = set(table.singles[arm].scores) if arm in table.singles else set()
    whole = [x for x in table.per_task if seeds and set(x.cell(arm).published.scores) == seeds]
    if not whole:
        return ""
    said = [f"`{line.label}` scores {_said(line.cell(arm).published)}" for line in whole]
    return (
        f"Where the task is known when the model runs, {_listed(said)}: one update per task, with "
        "nothing tuned. That is another service than one model for all, and not compared with it."
    )


def _limits(table: MethodTable, arm: str) -> str:
    whole = _whole(table, arm)
    seeds = len(table.singles[arm].scores) if arm in table.singles else 0
    if not whole:
        return "No method is finished on every seed yet."
    text = f"This is one small base model, {len(table.tasks)} tasks and {_seeds(seeds)}"
    if len(whole) > 2:
        text += f"; the highest of {len(whole)} methods is partly the luckiest"
    return f"{text}. Try two or three on your own selection rows (`orthomerge tune`)."


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _listed(names: list[str]) -> str:
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _are(names: list[str]) -> str:
    return "is" if len(names) < 2 else "are"


# ---------------------------------------------------------------------------------------------
# Tables and sections


def _tables(table: MethodTable, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    parts = []
    methods = {line.label: line.method for line in table.lines}
    for per_task in (False, True):
        cells = grid(table, per_task=per_task)
        if not cells:
            continue
        if measured:
            cells[0] += ["seconds a layer", "MiB a layer"]
            for line in cells[1:]:
                method = methods.get(line[0])
                line += _cost_cells(measured.get(_own_name(method)) if method else None)
        if per_task:
            parts.append("One update per task: the task must be known when the model runs.\n")
        parts.append(markdown_grid(cells) + "\n")
    return parts


def _cost_cells(row: Mapping[str, float] | None) -> list[str]:
    return ["", ""] if row is None else [f"{row['seconds']:.2g}", f"{row['extra_mib']:.0f}"]


def _outside(methods: Iterable[MergeMethod], table: MethodTable) -> str:
    """The methods the study has no rows of."""
    studied = {_own_name(line.method) for line in table.lines}
    left = [m.name for m in methods if m.name not in studied]
    if not left:
        return ""
    said = [f"`{name}`" + (f" ({_OUTSIDE[name]})" if name in _OUTSIDE else "") for name in left]
    return f"Not in the table: {', '.join(said)}.\n"


def _times(path: Path) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    return {row["method"]: row for row in _record(path)["rows"]}


def _own_name(method: str) -> str:
    """What a method is called in the list: an alias is listed under its method."""
    return get_method(method).alias_of or method


def _record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if isinstance(record, dict) else {"rows": record}


def _measured_note(path: Path) -> str:
    if not path.is_file():
        return "Times and memory of the methods have not been measured yet.\n"
    record = _record(path)
    about = [f"{n} adapters" for n in [record.get("adapters")] if n]
    about += [
        f"{word} {record[key]}" for key, word in (("rank", "rank"), ("d", "d")) if record.get(key)
    ]
    where = f"; {record['machine']}" if record.get("machine") else ""
    what = f" ({', '.join(about)}{where})" if about or where else ""
    return (
        f"Seconds and MiB are of merging one layer{what}; MiB are held in addition to the inputs.\n"
    )


def _section(method: MergeMethod, row: Mapping[str, float] | None) -> str:
    formula, cost = _described(method)
    lines = [f"### `{method.name}`: {method.title}\n", f"{method.summary}\n"]
    if formula:
        lines.append(f"{formula}\n")
    options = [
        "the command's `--rank`" if k == "rank" else f"`{k.rstrip('_')}={_value(v)}`"
        for k, v in method.options.items()
    ]
    if method.open_options:
        options.append("every option of `inner`")
    if method.aliases:
        lines.append(f"- Other names: {_aliases(method)}")
    lines.append(f"- Options: {', '.join(options) or 'none'}")
    lines.append(
        f"- Needs: {' and '.join(_NEEDS[n] for n in method.needs) or 'the adapters alone'}"
    )
    lines.append(f"- Gives: {_gives(method)}")
    lines.append(f"- Weight where none is given: {_weight(method)}")
    if method.by_factors:
        lines.append("- Depends on how an update is split between A and B, not on its value alone")
    if method.random:
        lines.append("- Can draw at random: `--seed` decides")
    elif not method.symmetric:
        lines.append("- The order of the adapters can matter")
    measured = f" (measured: {row['seconds']:.2g} s, {row['extra_mib']:.0f} MiB)" if row else ""
    lines.append(f"- Cost a layer: {cost or 'not stated'}{measured}")
    source = f"[{method.paper}]({method.url})" if method.url else method.paper
    lines.append(f"- Paper: {source}\n")
    return "\n".join(lines)


def _aliases(method: MergeMethod) -> str:
    """The names that give the same, each with where it is from."""
    named = [get_method(alias) for alias in method.aliases]
    return ", ".join(f"`{m.name}` ([{m.paper}]({m.url}))" for m in named)


def _weight(method: MergeMethod) -> str:
    rule = method.weight_rule({})
    if callable(method.default_weight):
        return f"{rule}, with other options that of what they choose"
    return f"{rule}, or 1 for adapters made to be summed" if rule == "1/√N" else rule


def _gives(method: MergeMethod) -> str:
    if method.per_task:
        return "one update per task, and a shared one; dense"
    if method.low_rank:
        return "factors"
    return "a dense update, which an adapter holds cut to rank R, or to that of `--rank`"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _described(method: MergeMethod) -> tuple[str, str]:
    """The first paragraph of the function's docstring, and its cost: the text after "O("."""
    text = inspect.getdoc(method.function) or ""
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    first = paragraphs[0] if paragraphs else ""
    cost = ""
    for paragraph in paragraphs:
        # To the end of its sentence; a stop inside a name or a number has no blank after it.
        if match := re.search(r"O\(.+?(?=\.(?:\s|$)|$)", paragraph):
            cost = match[0]
            break
    if cost and first.endswith(f"{cost}."):
        first = first.removesuffix(f"{cost}.").rstrip()
    return first, cost


def _bullets(texts: Iterable[str]) -> str:
    return "".join(f"- {text}\n" for text in texts)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()

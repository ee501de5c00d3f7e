"""How well the predicted shift tells what a merge costs: correlations, their page, their file.

python -m benchmarks.evidence

From the lines of results/prediction/ (`benchmarks.prediction` measures them) come the figures that
`orthomerge diagnose` quotes, `src/orthomerge/diagnostics/study.json`, and the tables of
docs/diagnose.md. The weight of what lies beside was chosen on the arms of CHOSEN_ON; the others
were looked at afterwards.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "results" / "prediction"
FILE = ROOT / "src" / "orthomerge" / "diagnostics" / "study.json"
PAGE = ROOT / "docs" / "diagnose.md"
BEGIN, END = "<!-- written by python -m benchmarks.evidence -->", "<!-- end -->"
CHOSEN_ON = ("default", "contrastive-project")
DRAWS, SEED = 2000, 0

# A point: predicted by shift, predicted by cosine, measured; higher is worse for all three.
Point = tuple[float, float, float]
Groups = Mapping[tuple[str, int], Mapping[str, Point]]


def read(name: str) -> list[dict[str, Any]]:
    """The lines of one part of the study."""
    path = LINES / f"{name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def merges(lines: Sequence[dict[str, Any]], split: str) -> Groups:
    """Every merge by arm and seed: mean shift, mean 1 - cosine, mean loss against alone."""
    found: dict[tuple[str, int], dict[str, Point]] = defaultdict(dict)
    for line in lines:
        if split in line:
            loss = np.mean(line["alone"]) - np.mean(line[split])
            point = float(np.mean(line["shift"])), 1 - float(np.mean(line["cosine"])), float(loss)
            found[line["arm"], line["seed"]][f"{line['method']}/{line['weight']:g}"] = point
    return found


def without(lines: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> Groups:
    """What leaving out an adapter (or a layer) changes, over the tasks that stay."""
    base = {(w["arm"], w["seed"]): w for w in whole if w["without"] is None}
    found: dict[tuple[str, int], dict[str, Point]] = defaultdict(dict)
    for line in lines:
        before = base.get((line["arm"], line["seed"]))
        if before is None or line["without"] is None:
            continue
        stay = [i for i in range(len(line["test"])) if i != line.get("place")]
        found[line["arm"], line["seed"]][line["without"]] = (
            _change(line["shift"], before["shift"], stay),
            -_change(line["cosine"], before["cosine"], stay),
            -_change(line["test"], before["test"], stay),
        )
    return found


def _change(after: Sequence[float], before: Sequence[float], stay: Sequence[int]) -> float:
    return float(np.mean([after[i] - before[i] for i in stay]))


def correlation(groups: Groups) -> dict[str, Any]:
    """Mean over arms and seeds of Spearman's rho, with its 95 % interval.

    The interval comes from drawing the merges (adapters, layers) again with replacement, the same
    ones for all arms and seeds that have them.
    """
    names = sorted({name for group in groups.values() for name in group})
    rng = np.random.default_rng(SEED)
    draws = [rng.integers(0, len(names), len(names)) for _ in range(DRAWS)]
    shift, cosine = _rho(groups, names, 0), _rho(groups, names, 1)
    again = [[names[i] for i in draw] for draw in draws]
    shifts = np.array([_rho(groups, chosen, 0) for chosen in again])
    cosines = np.array([_rho(groups, chosen, 1) for chosen in again])
    return {
        "rho": round(shift, 3), "interval": _interval(shifts),
        "cosine": round(cosine, 3), "cosine_interval": _interval(cosines),
        "gain_interval": _interval(shifts - cosines),
        "points": sum(len(group) for group in groups.values()), "groups": len(groups),
    }  # fmt: skip


def _rho(groups: Groups, names: Sequence[str], column: int) -> float:
    found = []
    for group in groups.values():
        points = [group[name] for name in names if name in group]
        measured, predicted = [p[2] for p in points], [p[column] for p in points]
        if len(set(measured)) > 1 and len(set(predicted)) > 1:
            found.append(float(spearmanr(predicted, measured).statistic))
    return float(np.mean(found))


def _interval(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in np.nanpercentile(values, [2.5, 97.5])]


def weight_choice(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By arm: mean selection score of every method at the weight chosen in three ways."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "selection" in line:
            groups[line["arm"], line["seed"], line["method"]].append(line)
    ways: dict[str, Callable[[dict[str, Any]], float]] = {
        "untuned": lambda line: abs(line["weight"] - 1),
        "least shift": lambda line: float(np.mean(line["shift"])),
        "best": lambda line: -float(np.mean(line["selection"])),
    }
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (arm, _, _), candidates in groups.items():
        if len(candidates) > 1:
            for way, key in ways.items():
                found[arm][way].append(float(np.mean(min(candidates, key=key)["selection"])))
    return {
        arm: {way: round(float(np.mean(v)), 4) for way, v in by_way.items()}
        | {"choices": len(by_way["best"])}
        for arm, by_way in found.items()
    }


def evidence() -> dict[str, Any]:
    """All figures of the study."""
    lines, layers = read("merges"), read("layers")
    parts = {
        "merges": merges(lines, "selection"),
        "merges_test": merges(lines, "test"),
        "leave_out": without(read("leave-out"), layers),
        "layers": without(layers, layers),
    }
    found: dict[str, Any] = {}
    for part, groups in parts.items():
        if not groups:
            continue
        arms = sorted({arm for arm, _ in groups})
        held = {k: g for k, g in groups.items() if k[0] not in CHOSEN_ON}
        found[part] = {
            "all": correlation(groups),
            **({"held_out": correlation(held)} if held else {}),
            "arms": {a: correlation({k: g for k, g in groups.items() if k[0] == a}) for a in arms},
        }
    return found | {"weights": weight_choice(lines), "chosen_on": list(CHOSEN_ON)}


_PARTS = {
    "merges": "Merges, at every weight tried, scored on selection rows",
    "merges_test": "Merges scored on test rows: untuned, and at the weight chosen",
    "leave_out": "Leaving one adapter out of the sum: the others' change of score",
    "layers": "Leaving one layer out of the sum: all tasks' change of score",
}


def block(found: Mapping[str, Any]) -> str:
    """The tables of the page."""
    lines = [BEGIN]
    for part, title in _PARTS.items():
        if part not in found:
            continue
        lines += ["", f"**{title}**", ""]
        lines += [
            "| adapters | points | predicted shift | plain cosine |",
            "| --- | --- | --- | --- |",
        ]
        rows = {f"`{arm}`{_used(arm)}": c for arm, c in found[part]["arms"].items()}
        rows["all"] = found[part]["all"]
        if "held_out" in found[part]:
            rows["those c was not chosen on"] = found[part]["held_out"]
        lines += [
            f"| {name} | {c['points']} | {_cell(c['rho'], c['interval'])} | "
            f"{_cell(c['cosine'], c['cosine_interval'])} |"
            for name, c in rows.items()
        ]
    lines += [
        "", "**Weights chosen by the shift**: mean selection score over all methods, at weight "
        "1, at the weight of least predicted shift, at the best of the weights tried", "",
        "| adapters | choices | untuned | least shift | best |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| `{arm}` | {w['choices']} | {w['untuned']:.1%} | {w['least shift']:.1%} | "
        f"{w['best']:.1%} |"
        for arm, w in found["weights"].items()
    ]
    return "\n".join([*lines, END])


def _used(arm: str) -> str:
    return " (c was chosen here)" if arm in CHOSEN_ON else ""


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def page(found: Mapping[str, Any], text: str) -> str:
    """The page with its tables written anew."""
    head, _, rest = text.partition(BEGIN)
    return head + block(found) + rest.partition(END)[2]


def main() -> None:
    """Write the file and the page."""
    found = evidence()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(block(found))


if __name__ == "__main__":
    main()

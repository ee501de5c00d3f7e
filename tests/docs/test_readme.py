"""The figures of README.md are those of the kept rows."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import stdev

import pytest

from orthomerge.io.rows import read_rows
from orthomerge.report import markdown_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARMS = ("default", "contrastive-project", "osrm-frozen")
# The table of limits: a row's title, the folder of its run, and what its arms are called there.
LIMITS = [
    ("as above", "offline8", "{}"),
    ("30 samples", "limits-samples", "{}-30"),
    ("10 samples", "limits-samples", "{}-10"),
    ("sixteen tasks", "limits-sixteen", "{}"),
    ("rank 32", "limits-rank32", "{}"),
    ("rank 64", "limits-rank64", "{}"),
    ("every linear layer", "limits-all-linear", "{}"),
]


def cells(table: str) -> dict[str, list[str]]:
    """The cells of every row of a Markdown table by the row's first cell, bold or not."""
    rows = [line.replace("*", "").strip("| \n").split("|") for line in table.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) > 1}


def table_after(sentence: str) -> dict[str, list[str]]:
    rest = README[README.index(sentence) :]
    return cells(rest[rest.index("\n|") :].split("\n\n")[0])


def test_the_demos_table_is_written_from_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.readme import page

    assert page() == README, "run `make pages`"


def test_what_the_demo_keeps_is_worked_out_from_the_kept_rows():
    kept = cells(markdown_table(read_rows(ROOT / "results/demo/results.jsonl")))
    head = kept.pop("arm")

    def share(arm: str, *weights: str) -> str:
        merged = max(float(kept[arm][head.index(f"sum × {weight}")]) for weight in weights)
        return f"{100 * merged / float(kept[arm][head.index('single')]):.0f} %"

    weights = ("0.2", "0.4", "0.6", "0.8", "1")
    shown = re.findall(r"\d+ %", README[README.index("On these four") :])[:4]
    assert shown == [
        share("osrm", "0.4"),
        share("default", *weights),
        share("contrastive-project", "1"),
        share("default", "1"),
    ]


def test_the_table_of_eight_tasks_is_that_of_the_kept_rows():
    kept = cells(markdown_table(read_rows(ROOT / "results/offline8/results.jsonl")))
    shown = table_after("Mean score × 100, and the")
    assert len(shown) > 6
    for arm, figures in shown.items():
        if arm in kept:
            assert figures[:-1] == kept[arm], arm
    assert {"default", "osrm", "contrastive-project"} <= shown.keys() & kept.keys()


@pytest.mark.parametrize("title, folder, name", LIMITS, ids=[row[0] for row in LIMITS])
def test_the_table_of_limits_is_that_of_the_kept_rows(title, folder, name):
    rows = [r for r in read_rows(ROOT / f"results/{folder}/results.jsonl") if r.seed == 0]
    kept = cells(markdown_table(rows))
    head = kept["arm"]
    places = [head.index(column) for column in ("single", "sum × 0.4", "sum × 0.6", "sum × 1")]
    table = table_after("The limits of `project`")
    shown = next(v for k, v in table.items() if k.startswith(title))
    for arm, cell in zip(ARMS, shown, strict=True):
        if cell:
            figures = kept[name.format(arm)]
            alone, *sums = (figures[place] for place in places)
            assert cell == f"{alone} · {' '.join(sums)}", arm


def test_the_penaltys_table_is_that_of_its_rows():
    shown = table_after("**The penalty instead of a constraint.**")
    for run, suffix in (("offline8-penalty", ""), ("offline8-penalty-no-dropout", ", no dropout")):
        kept = cells(markdown_table(read_rows(ROOT / f"results/{run}/results.jsonl")))
        places = [kept["arm"].index(column) for column in shown["arm"]]
        for arm in ("default", "penalty", "isotropic"):
            assert shown[arm + suffix] == [kept[arm][place] for place in places]


def test_what_is_said_of_the_penalty_is_so():
    run = ROOT / "results/offline8-penalty-no-dropout/results.jsonl"
    rows = [r for r in read_rows(run) if r.split == "test" and r.weight != 0.2]

    def scores(arm, weight):
        for seed in range(5):
            of = [r for r in rows if (r.arm, r.seed, r.weight) == (arm, seed, weight)]
            assert len(of) == 8
            yield 100 * sum(r.value for r in of) / 8

    def best(arm):
        return [max(of) for of in zip(*(scores(arm, w) for w in (0.4, 0.6, 0.8, 1.0)), strict=True)]

    said = README[README.index("**The penalty instead of a constraint.**") :].replace("\n", " ")
    penalty, isotropic, default = (best(arm) for arm in ("penalty", "isotropic", "default"))
    means = [sum(of) / 5 for of in (penalty, default)]
    assert f"best weight {means[0]:.1f} against {means[1]:.1f}" in " ".join(said.split())
    gains = [a - b for a, b in zip(penalty, isotropic, strict=True)]
    untuned = [a - b for a, b in zip(scores("penalty", 1.0), scores("isotropic", 1.0), strict=True)]
    sentence = " ".join(said.split())
    for found in (gains, untuned):
        assert f"by {sum(found) / 5:.1f} ± {stdev(found):.1f}" in sentence
    assert f"({min(gains):.1f} to {max(gains):.1f})" in sentence


def test_the_distilled_table_is_that_of_its_rows():
    shown = table_after("**Distilled after the merge**")
    sources = {
        "default": ("default", "offline8-penalty", "offline8-penalty-distill"),
        "penalty, no dropout": ("penalty", "offline8-penalty-no-dropout", "offline8-distill"),
    }
    for title, (arm, run, distilled) in sources.items():
        kept, found = (
            [r for r in read_rows(ROOT / f"results/{folder}/results.jsonl")
             if r.arm == arm and r.split == "test"]
            for folder in (run, distilled)
        )  # fmt: skip
        parts = [
            [r for r in kept if r.method == "single"],
            [r for r in kept if r.method == "task_arithmetic" and r.weight == 1],
            *(
                [
                    r
                    for r in found
                    if r.method == "distill"
                    and (r.options["rank"], r.options["steps"], r.options["samples"])
                    == (rank, 150, 100)
                ]
                for rank in (16, 8)
            ),
        ]
        for cell, part in zip(shown[title], parts, strict=True):
            seeds = [[100 * r.value for r in part if r.seed == seed] for seed in range(3)]
            assert [len(values) for values in seeds] == [8, 8, 8]
            means = [sum(values) / 8 for values in seeds]
            assert cell == f"{sum(means) / 3:.1f} ± {stdev(means):.1f}"

"""The terminal's table fits the terminal and shows every number."""

from __future__ import annotations

import pytest
from fake_rows import ARMS, MERGES, TASKS, fake_rows, row
from rich.console import Console

from orthomerge.report import summarize, summary_table


def shown(rows, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(rows))
    return capture.get()


@pytest.mark.parametrize(("arms", "width"), [(3, 80), (5, 100), (12, 100)])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_score_is_shown_whole(arms, width, seeds):
    rows = fake_rows(ARMS[:arms], TASKS, seeds, MERGES[:9])
    text = shown(rows, width)
    assert all(len(line) <= width for line in text.splitlines())
    summary = summarize(rows)
    for cell in summary.cells.values():
        assert cell.score is not None
        assert f"{100 * cell.score.mean:.1f}" in text
    assert "…" not in text


def test_names_are_not_markup():
    assert "[bold]x[/]" in shown([row("a", "[bold]x[/]", 0.5)], 80)


def test_missing_scores_and_notices():
    rows = [row("a", "x", 0.5), row("b", "x", 0.5), row("a", "y", 0.5)]
    text = shown(rows, 100)
    assert "–" in text
    assert "1 of 2 tasks so far" in " ".join(text.split())
    nothing = shown([row("a", "x", 0.5, split="selection")], 100)
    assert "scored on every task yet" in " ".join(nothing.split())

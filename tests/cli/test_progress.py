"""What a person sees of long work: bars at a terminal, lines elsewhere, nothing when asked."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from conftest import call
from rich.console import Console

from orthomerge.cli import _progress, _run_progress
from orthomerge.errors import OrthomergeError
from orthomerge.io.rows import ResultRow


def screen(monkeypatch, *, terminal):
    """Progress on a console of its own; what it prints is in its file."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    for module in (_progress, _run_progress):
        monkeypatch.setattr(module, "bars", console)
    return console


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(_progress, "time", fake)
    monkeypatch.setattr(_run_progress, "time", fake)
    monkeypatch.setattr(_progress, "_EVERY", 15.0)
    return now


def row(task, method="single", weight=None, value=0.5):
    return ResultRow(
        task=task, arm="osrm", start="min_eigen", solver="min_eigen", granularity="token",
        constraint="init", learning_rate=1e-3, method=method, weight=weight, metric="accuracy",
        value=value, seed=0, n=10, split="test", key=f"{task}/{method}/{weight}",
    )  # fmt: skip


def test_long_work_without_a_terminal_says_a_line_now_and_then(monkeypatch, clock):
    console = screen(monkeypatch, terminal=False)
    with _progress.work_bar("layers") as progress:
        for done in range(1, 41):
            clock.seconds += 5
            progress(done, 40, 0.5 if done > 20 else None)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 13  # every third of 40 calls
    assert lines[0] == "layers: 3 of 40, 3 min 05 s left"
    assert lines[-1] == "layers: 39 of 40, 0.5000, 5 s left"


def test_short_work_without_a_terminal_says_nothing(monkeypatch, clock):
    console = screen(monkeypatch, terminal=False)
    with _progress.work_bar("layers") as progress:
        advance = _progress.adding(progress, 3)
        for _ in range(3):
            clock.seconds += 4
            advance()
    assert console.file.getvalue() == ""


def test_a_bar_at_a_terminal_has_the_value_so_far(monkeypatch):
    console = screen(monkeypatch, terminal=True)
    with _progress.work_bar("trials [odd]") as progress:
        progress(2, 8, 0.625)
    assert "trials [odd]" in console.file.getvalue()
    assert "2/8 0.6250" in console.file.getvalue()


def run_of(progress):
    with progress:
        progress.known([row("one", value=0.25)])
        progress.jobs(1, 4)
        progress.stage("train osrm")
        progress.step(3, 4)
        progress.row(row("one", "ties", 0.4, 0.75))
        progress.row(row("one", "distill", None, 0.75))
        progress.stage("evaluate osrm")
        return progress._picture()


def test_a_run_without_a_terminal_says_a_line_a_stage_and_a_row(monkeypatch):
    console = screen(monkeypatch, terminal=False)
    run_of(_run_progress.RunProgress())
    assert console.file.getvalue().splitlines() == [
        "[1/4] train osrm",
        "[1/4]   osrm · one · ties 0.4, test, seed 0: accuracy 75.0",
        "[1/4]   osrm · one · distill, test, seed 0: accuracy 75.0",
        "[1/4] evaluate osrm",
    ]


def test_a_run_at_a_terminal_shows_the_table_so_far(monkeypatch, clock):
    console = screen(monkeypatch, terminal=True)
    clock.seconds = 10.0
    picture = run_of(_run_progress.RunProgress())
    plain = Console(file=io.StringIO(), width=100)
    plain.print(picture)
    text = plain.file.getvalue()
    assert "job 1 of 4" in text and "Mean score" in text and "25.0" in text  # the earlier row
    assert "0/?" in text  # a new chunk does not show the total of the one before
    assert "osrm" in console.file.getvalue()


def test_quiet_is_quiet_at_a_terminal_and_elsewhere(monkeypatch, clock):
    for terminal in (True, False):
        console = screen(monkeypatch, terminal=terminal)
        console.quiet = True
        clock.seconds += 100
        run_of(_run_progress.RunProgress())
        with _progress.work_bar("layers") as progress:
            clock.seconds += 100
            progress(1, 2)
        assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    "verb",
    ["run", "demo", "stats", "train", "eval", "convert", "merge", "tune", "diagnose"],
)
def test_every_long_verb_can_be_quiet(verb):
    assert "--quiet" in call(verb, "--help")


def test_the_option_lasts_for_one_command(tmp_path):
    console = _progress.bars
    with pytest.raises(OrthomergeError):
        call("diagnose", tmp_path / "none", "--quiet")
    assert console.quiet
    with pytest.raises(OrthomergeError):
        call("diagnose", tmp_path / "none")
    assert not console.quiet

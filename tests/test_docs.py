"""Pages that are made from files say what the files say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import call, write_task
from typer.main import get_command

from orthomerge.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def commands(page: str) -> list[list[str]]:
    """The arguments of every `orthomerge` call in a page's code blocks, lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = "\n".join(block for language, block in found if language in ("", "bash"))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True)[1:] for x in lines if x.startswith("orthomerge ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_can_be_parsed(page):
    """Verbs, options and the types of their values; what is written in short (...) is passed by."""
    group = get_command(app)
    for arguments in commands(page):
        if "..." in arguments:
            continue
        with group.make_context("orthomerge", arguments) as context:
            name, command, rest = group.resolve_command(context, arguments)
            assert command is not None, arguments
            command.make_context(name, rest, parent=context)


def test_the_page_of_merging_has_commands():
    assert len(commands("docs/merging.md")) > 10


@pytest.mark.slow
def test_every_command_of_the_page_of_merging_works(tiny_base, tmp_path, monkeypatch):
    """In their order, on tiny adapters; searches are cut short and the hub is left alone."""
    from small_adapters import make_adapter

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        make_adapter(Path(name), tiny_base, seed)
        write_task(Path(f"{name}.jsonl"), 1200, seed=seed)
    short = {"tune": ["--trials", "2"], "entropy": ["--steps", "2"]}
    for arguments in commands("docs/merging.md"):
        known = {"minilm": tiny_base, "org/base": tiny_base, "org/name@main": "c/"}
        filled = [str(known.get(a, a)).replace(".csv", ".jsonl") for a in arguments]
        if "--output" in filled and Path(filled[filled.index("--output") + 1]).is_dir():
            shutil.rmtree(filled[filled.index("--output") + 1])
        if "entropy" in filled:
            filled += short["entropy"]
        elif "--tune" in filled or filled[0] == "tune":
            filled += short["tune"]
        assert call(*filled), arguments


def test_the_benchmark_page_is_made_of_the_kept_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.table"


def test_the_page_of_methods_is_made_of_the_kept_rows_and_the_registry(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.methods import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.methods"


def test_the_page_of_diagnosis_and_the_quoted_evidence_are_made_of_the_kept_lines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import FILE, PAGE, page

    found = json.loads(FILE.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(found, text), "run: python -m benchmarks.evidence"


def test_the_page_on_conversion_is_made_of_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.convert import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.convert"

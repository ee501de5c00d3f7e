"""Every code block of the documents runs as it stands, or the page says why it does not."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from blocks import PAGES, ROOT, SHELL, Block, blocks
from conftest import call
from typer.main import get_command
from world import build, names, run

from orthomerge.cli import app
from orthomerge.experiment import load_recipe

# Pages whose blocks are run by tests of their own, and the pages that take longer.
ELSEWHERE = {
    "CONTRIBUTING.md": "tests/docs/test_contributing.py",
    "docs/tutorial.md": "tests/docs/test_tutorial.py",
    "docs/interoperate.md": "tests/interop",
    "docs/text-to-text.md": "tests/cli/test_text_commands.py",
}
SLOW = {f"docs/{name}.md" for name in ("report", "scale", "tenth-task", "which-method")}
ALL = [block for page in PAGES for block in blocks(page)]


def is_command(block: Block) -> bool:
    return block.language in SHELL


@pytest.mark.parametrize("block", [b for b in ALL if is_command(b)], ids=str)
def test_every_command_can_be_parsed(block):
    """Verbs, options and the types of their values; recipes that are named exist."""
    group = get_command(app)
    for words in block.commands:
        if words[0] != "orthomerge" or "..." in words:
            continue
        with group.make_context("orthomerge", words[1:]) as context:
            name, command, rest = group.resolve_command(context, words[1:])
            assert command is not None, words
            command.make_context(name, list(rest), parent=context)
        if name in ("run", "plan") and rest[0].startswith("recipes/"):
            load_recipe(str(ROOT / rest[0]))


PARSERS = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}


@pytest.mark.parametrize("block", [b for b in ALL if not is_command(b)], ids=str)
def test_every_other_block_is_what_it_says_it_is(block):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language in PARSERS:
        assert PARSERS[block.language](block.text)
    elif block.language == "diff":
        assert ELSEWHERE.get(block.page) == "tests/docs/test_contributing.py", "nobody applies it"
    else:
        assert block.language == "text", f"{block}: no test knows '{block.language}'"


@pytest.fixture(scope="session")
def template(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    build(folder, tiny_base)
    return folder


def page_parameter(page: str):
    return pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])


RUN = [page for page in PAGES if page not in ELSEWHERE and any(not b.not_run for b in blocks(page))]


@pytest.mark.parametrize("page", map(page_parameter, RUN))
def test_the_blocks_of_a_page_run_in_their_order(page, template, tiny_base, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: figure.to_json())
    if page == "docs/trust.md":
        call("merge", "a/", "b/", "--output", "merged/")
    if page == "docs/report.md":
        for name in ("demo", "before", "after"):
            call("run", "recipes/demo.yaml", "--output", f"runs/{name}", "--quiet")
    namespace = names(tiny_base)
    for block in blocks(page):
        if not block.not_run:
            run(block, tiny_base, namespace)


def test_pages_that_are_run_elsewhere_are_so():
    """A page that is excused here and exists names tests that exist."""
    for page, where in ELSEWHERE.items():
        assert not (ROOT / page).is_file() or (ROOT / where).exists(), page

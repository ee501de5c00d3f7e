"""CONTRIBUTING.md, followed to the letter on a copy of the source, then the suite it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks

COPIED = ("pyproject.toml", "README.md", "src", "tests/conftest.py", "tests/browser")


def blocks_about(word: str):
    """The blocks from the section whose file is `word`.py on, up to the next file."""
    found, inside = [], False
    for block in blocks("CONTRIBUTING.md"):
        if block.language == "python":
            inside = f"/{word}.py" in block.text.splitlines()[0]
        if inside and block.language in ("python", "diff"):
            found.append(block)
    return found


def apply(block, root: Path) -> None:
    """Write a whole file, or put each run of `+` lines behind the line above it."""
    if block.language == "python":
        name, text = block.text.split("\n", 1)
        path = root / name.removeprefix("# ")
        assert not path.exists(), f"{path} is there already: the page needs another name"
        path.write_text(text, encoding="utf-8")
        return
    path, after = root, ""
    for line in block.text.splitlines():
        if line.startswith("--- "):
            path = root / line.removeprefix("--- ")
        elif line.startswith("+"):
            text = path.read_text(encoding="utf-8")
            assert text.count(f"\n{after}\n") == 1, f"'{after}' is not one line of {path}"
            path.write_text(text.replace(f"\n{after}\n", f"\n{after}\n{line[1:]}\n"), "utf-8")
            after = f"{after}\n{line[1:]}"
        else:
            after = line[1:]


def run(root: Path, *arguments: object) -> str:
    here = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(
            source, target
        )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "word, suite, least",
    [
        ("middle", "tests/conformance/test_methods.py", 10),
        ("strongest", "tests/subspace/test_conformance.py", 10),
        ("party", "tests/tasks/test_offline.py", 3),
    ],
)
def test_the_page_followed_gives_what_the_suite_takes(word, suite, least, copy):
    shutil.copytree(ROOT / suite.rpartition("/")[0], copy / suite.rpartition("/")[0])
    for block in blocks_about(word):
        apply(block, copy)
    said = run(copy, "pytest", suite, "-k", word, "-p", "no:cacheprovider")
    assert int(said.rpartition(" passed")[0].split()[-1]) >= least, said
    listed = {"middle": "methods", "strongest": "solvers", "party": "tasks"}[word]
    assert word in run(copy, "orthomerge", listed, "--json")
    for command in ("ruff check", "ruff format --check"):
        made = blocks_about(word)[0].text.splitlines()[0].removeprefix("# ")
        run(copy, *command.split(), made)

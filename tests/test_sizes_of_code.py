"""No function and no file of the source grows past what is read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BODY, FILE = 40, 300
"""Most lines of a function without its signature and docstring, and of a file."""


def bodies(source: str) -> Iterator[tuple[str, int]]:
    """Every function's name and the lines of its body."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = ast.get_docstring(node, clean=False) is not None
            before = node.body[0].end_lineno if told else node.body[0].lineno - 1
            yield node.name, node.end_lineno - before


def too_long(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
        if (count := text.count("\n")) > FILE:
            found.append(f"{name}: {count} lines, at most {FILE}")
        for function, count in bodies(text):
            if count > BODY:
                found.append(f"{name}:{function}: {count} lines, at most {BODY}")
    return found


def test_functions_and_files_of_the_source_are_short():
    found = too_long(ROOT / "src")
    assert not found, "cut these where a reader would:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (40, []),
        (41, ["a.py:f: 41 lines, at most 40"]),
        (300, ["a.py: 305 lines, at most 300", "a.py:f: 300 lines, at most 40"]),
    ],
)
def test_what_is_too_long_is_named(tmp_path, lines, said):
    head = 'def f(\n    a,\n):\n    """Says\n    much."""\n'
    (tmp_path / "a.py").write_text(head + "    a += 1\n" * lines)
    assert too_long(tmp_path) == said

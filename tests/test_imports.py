"""Importing orthomerge, and asking its command line for help, loads none of the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import orthomerge

HEAVY = {"torch", "transformers", "peft", "sklearn", "pandas", "scipy", "numpy", "datasets"}

CALL = """
import sys
from orthomerge.cli import main

sys.argv = ["orthomerge", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded_by(code: str) -> tuple[set[str], str]:
    """The heavy libraries in `sys.modules` after `code` in a process of its own, and its output."""
    code += f"\nimport sys\nprint(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split()), done.stdout


def test_the_check_sees_what_is_loaded():
    assert loaded_by("import orthomerge; orthomerge.moments.SecondMoment")[0] >= {"torch", "numpy"}


def test_importing_loads_nothing_heavy():
    assert loaded_by("import orthomerge; dir(orthomerge)")[0] == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["stats", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments):
    heavy, said = loaded_by(CALL.format(arguments=arguments))
    assert heavy == set()
    assert said.strip()


def test_the_version_is_that_of_the_package():
    assert loaded_by(CALL.format(arguments=["--version"]))[1] == (
        f"orthomerge {version('orthomerge')}\n"
    )
    assert orthomerge.__version__ == version("orthomerge")


def test_listing_methods_needs_no_scikit_learn():
    assert "sklearn" not in loaded_by("from orthomerge.merging import list_methods")[0]


def test_what_type_checkers_see_is_what_python_gives():
    """`TYPE_CHECKING` imports, `__all__` and the table of homes name the same things."""
    tree = ast.parse(Path(str(orthomerge.__file__)).read_text(encoding="utf-8"))
    block = next(
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    )
    seen = {a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == set(orthomerge.__all__)
    for name in orthomerge.__all__:
        assert getattr(orthomerge, name) is not None


def test_a_name_that_moved_still_works_and_says_where_it_is():
    for home, names in orthomerge.PACKAGES.items():
        for name in names:
            with pytest.deprecated_call(match=rf"orthomerge\.{home}\.{name}"):
                found = getattr(orthomerge, name)
            assert found is getattr(import_module(f"orthomerge.{home}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        _ = orthomerge.merge_everything

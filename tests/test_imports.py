"""Importing orthomerge, and asking its command line for help, loads none of the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from peft_oracle import bert, save_adapter

import orthomerge
from orthomerge.adapters import merge_adapters
from orthomerge.io.rows import append_rows

sys.path.insert(0, str(Path(__file__).resolve().parent / "report"))

from fake_rows import fake_rows

HEAVY = {
    "torch", "transformers", "peft", "sklearn", "pandas", "scipy", "numpy", "datasets",
    "matplotlib", "httpx", "accelerate", "torch._dynamo",
}  # fmt: skip

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
    code += (
        f"\nimport sys\nprint('\\nloaded', *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.rpartition("loaded")[2].split()), done.stdout


def test_the_check_sees_what_is_loaded():
    assert loaded_by("import orthomerge; orthomerge.moments.SecondMoment")[0] >= {"torch", "numpy"}


def test_importing_loads_nothing_heavy():
    assert loaded_by("import orthomerge; dir(orthomerge)")[0] == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["stats", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments):
    heavy, said = loaded_by(CALL.format(arguments=arguments))
    assert heavy == set()
    assert said.strip()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two adapters, a merge of them and a run's rows, in one folder."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate("ab"):
        save_adapter(folder / name, bert, seed, base_name="org/base", target_modules=["query"])
    merge_adapters([folder / "a", folder / "b"], output=folder / "merged")
    (folder / "run").mkdir()
    append_rows(folder / "run" / "results.jsonl", fake_rows())
    return folder


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ("merge {0}/a {0}/b -o {0}/out", {"torch", "numpy"}),
        ("verify {0}/merged --redo", {"torch", "numpy"}),
        ("diagnose {0}/a {0}/b", {"torch", "numpy", "scipy"}),
        ("report {0}/run", {"numpy", "pandas"}),
        ("list", {"torch", "numpy"}),
        ("list tasks", set()),
        ("list recipes", set()),
    ],
)
def test_a_verb_loads_what_it_needs_and_nothing_else(arguments, needed, inputs):
    heavy, said = loaded_by(CALL.format(arguments=arguments.format(inputs).split()))
    assert heavy <= needed
    assert said.strip()


def test_the_version_is_that_of_the_package():
    assert loaded_by(CALL.format(arguments=["--version"]))[1] == (
        f"orthomerge {version('orthomerge')}\n"
    )
    assert orthomerge.__version__ == version("orthomerge")


def lazy_packages():
    """Every package whose names are imported when they are first used."""
    root = Path(str(orthomerge.__file__)).parent
    files = [f for f in root.rglob("__init__.py") if "first_use(__name__)" in f.read_text("utf-8")]
    return {".".join(("orthomerge", *f.relative_to(root).parent.parts)): f for f in files}


@pytest.mark.parametrize("name", sorted(lazy_packages()))
def test_what_type_checkers_see_is_what_python_gives(name):
    package, file = import_module(name), lazy_packages()[name]
    block = next(n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    seen = {a.asname or a.name for n in imports for a in n.names}
    old = {a.asname for n in imports for a in n.names if a.asname}
    assert seen - old == set(package.__all__)
    for public in seen:
        assert getattr(package, public) is not None
        assert not (file.parent / f"{public}.py").exists(), "the module would hide the name"
    with pytest.raises(AttributeError):
        _ = package.no_such_name


def test_a_name_that_moved_still_works_and_says_where_it_is():
    for home, names in orthomerge.PACKAGES.items():
        for name in names:
            with pytest.deprecated_call(match=rf"orthomerge\.{home}\.{name}"):
                found = getattr(orthomerge, name)
            assert found is getattr(import_module(f"orthomerge.{home}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        _ = orthomerge.merge_everything

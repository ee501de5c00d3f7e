"""The registry of merge methods."""

import ast
import dataclasses
import os
import subprocess
import sys

import pytest

from orthomerge import merging
from orthomerge.errors import MergeError, UnknownNameError
from orthomerge.merging import ROWS, MergeMethod, get_method, list_methods, register
from orthomerge.merging.registry import ENTRY_POINTS

FIRST = ["linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "breadcrumbs"]


def test_methods_are_listed_in_the_order_of_registration():
    assert [m.name for m in list_methods()][: len(FIRST)] == FIRST


@pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
def test_a_row_says_what_when_and_whence(method: MergeMethod):
    assert method.title and method.paper
    assert method.summary.endswith(".") and method.summary.count(". ") == 0
    assert method.url.startswith("https://")
    assert "generator" not in method.options
    assert method.function.__doc__ and "O(" in method.function.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"
    with pytest.raises(TypeError):
        method.options["density"] = 1


def test_options_are_the_keyword_only_parameters_with_their_defaults():
    assert dict(get_method("ties").options) == {
        "density": 0.2,
        "majority_sign_method": "total",
        "lambda_": 1.0,
        "space": "delta",
    }


def test_an_unknown_method_lists_the_valid_and_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"did you mean 'dare_ties'\? valid: linear, svd"):
        get_method("dare-ties")


@pytest.mark.parametrize("name", ["ties", "cat"])
def test_a_name_is_registered_once(name):
    again = register(name=name, title="", summary="", paper="", url="")
    with pytest.raises(MergeError, match=f"'{name}' is already registered"):
        again(lambda factors, weights: factors[0])


@pytest.mark.parametrize("alias", ["cat", "task_arithmetic", "knots_ta"])
def test_an_alias_is_the_same_method_under_its_own_name(alias):
    own, found = get_method("linear"), get_method(alias)
    assert alias in own.aliases and alias not in {m.name for m in list_methods()}
    assert (found.name, found.alias_of, own.alias_of) == (alias, "linear", None)
    assert found.function is own.function and found.options == own.options
    assert found.paper != own.paper and found.url != own.url


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_of_the_table_has_the_options_it_reads_and_no_other(row):
    method = get_method(row.name)
    assert method.low_rank is (row.space is not None)
    assert method.random is row.random
    assert ("space" in method.options) is (row.space is None)
    assert ("density" in method.options) is (row.sparsifier != "none")
    assert ("majority_sign_method" in method.options) is (row.consensus == "elect")
    assert getattr(merging, row.name) is method.function
    with pytest.raises(TypeError, match="nonsense"):
        method.function([], [], nonsense=1)


PLUGIN = """
from orthomerge.factors import weighted_sum
from orthomerge.merging import register


def halved(factors, weights, *, by: float = 2.0):
    \"\"\"The sum, divided.\"\"\"
    return weighted_sum(factors, [w / by for w in weights])


@register(name="declared", title="D", summary="Use it.", paper="Me", url="https://x", low_rank=True)
def declared(factors, weights):
    \"\"\"O(1).\"\"\"
    return factors[0]
"""


def plugin(tmp_path, points: str) -> dict[str, str]:
    """An installed package, as pip leaves it: a module and its entry points."""
    (tmp_path / "my_merges.py").write_text(PLUGIN)
    info = tmp_path / "my_merges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{points}")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(code: str, env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_another_package_brings_a_method_with_one_function(tmp_path):
    env = plugin(tmp_path, "halved = my_merges:halved\ndeclared = my_merges:declared\n")
    code = (
        "from orthomerge.merging import get_method, list_methods;"
        "m = get_method('halved');"
        "print(m.summary, dict(m.options), m.paper);"
        "print([m.name for m in list_methods()][-2:])"
    )
    done = run(code, env)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "The sum, divided. {'by': 2.0} my_merges"
    assert sorted(ast.literal_eval(said[1])) == ["declared", "halved"]


def test_a_plugin_that_fails_is_named_and_takes_no_other_method_away(tmp_path):
    env = plugin(tmp_path, "broken = my_merges:absent\nhalved = my_merges:halved\n")
    done = run("from orthomerge.merging import get_method; get_method('halved')", env)
    assert done.returncode == 0, done.stderr
    assert "the merging method 'broken' of 'my_merges:absent' was left out" in done.stderr


def test_merging_imports_neither_peft_nor_transformers():
    code = (
        "import sys, orthomerge.merging;"
        "sys.exit(sorted({'peft', 'transformers', 'typer'} & set(sys.modules)).__repr__()"
        " if {'peft', 'transformers', 'typer'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

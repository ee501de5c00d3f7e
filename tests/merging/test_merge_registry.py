"""The registry of merge methods."""

import dataclasses
import subprocess
import sys

import pytest

from orthomerge.errors import MergeError, UnknownNameError
from orthomerge.merging import MergeMethod, get_method, list_methods, register

FIRST = ["linear", "cat", "task_arithmetic", "svd", "ties", "dare_linear", "dare_ties"]


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
    with pytest.raises(UnknownNameError, match=r"did you mean 'dare_ties'\? valid: linear, cat"):
        get_method("dare-ties")


def test_a_name_is_registered_once():
    again = register(name="ties", title="", summary="", paper="", url="")
    with pytest.raises(MergeError, match="'ties' is already registered"):
        again(lambda factors, weights: factors[0])


def test_merging_imports_neither_peft_nor_transformers():
    code = (
        "import sys, orthomerge.merging;"
        "sys.exit(sorted({'peft', 'transformers', 'typer'} & set(sys.modules)).__repr__()"
        " if {'peft', 'transformers', 'typer'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The types of `orthomerge.linalg` are those of the functions that it hands on."""

import ast
from pathlib import Path

import torch

from orthomerge import linalg

STUB = ast.parse(Path(linalg.__file__).with_suffix(".pyi").read_text())
RESULTS = {
    "Cholesky": linalg.cholesky_ex,
    "Eigh": linalg.eigh,
    "QR": linalg.qr,
    "SVD": linalg.svd,
}


def test_the_stub_names_what_the_module_hands_on():
    functions = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef)}
    assert functions | {"LinAlgError"} == set(linalg.__all__)


def test_results_have_the_fields_that_the_stub_says():
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    for name, function in RESULTS.items():
        said = [f.target.id for f in classes[name].body if isinstance(f, ast.AnnAssign)]
        assert [f for f in dir(function(torch.eye(2))) if f in said] == sorted(said)
        assert len(function(torch.eye(2))) == len(said)

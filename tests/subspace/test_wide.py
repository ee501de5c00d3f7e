"""Wide matrices, where nobody wants a full eigendecomposition: the same answers as with one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import SubspaceError
from orthomerge.moments import RowMoment, SecondMoment
from orthomerge.subspace import _types, get_solver, orthonormal_rows, smallest

D, RANK = 1100, 8


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(3000 + seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


TURN = torch.linalg.qr(normal(D, D)).Q


def with_spectrum(values, turn=TURN):
    matrix = (turn * values) @ turn.T
    return (matrix + matrix.T) / 2


def spectrum(first, rest=None):
    """Some values, then the rest evenly between two."""
    head = torch.tensor(first, dtype=torch.float64)
    low, high = rest or (1.0, 2.0)
    return torch.cat([head, torch.linspace(low, high, D - len(head), dtype=torch.float64)])


SPECTRA = {
    "flat bottom": spectrum([1e-3] * 50),
    "linear": spectrum([], (1 / D, 1.0)),
    "steep": torch.logspace(-9, 0, D, dtype=torch.float64),
    "condition 1e12": torch.logspace(-12, 0, D, dtype=torch.float64),
    "half empty": spectrum([0.0] * 500),
    "fewer zeros than the rank": spectrum([0.0] * 3, (0.01, 2.0)),
    "zeros and tiny values": spectrum([0.0] * 3 + [1e-9, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3]),
    "clustered at the edge": spectrum([1e-2] * 4 + [1.0001e-2] * 200),
    "one loud direction": spectrum([0.0] * 500 + [1e-3] * 599 + [1e4], (1e4, 1e4)),
    "identity": torch.ones(D, dtype=torch.float64),
    "nothing": torch.zeros(D, dtype=torch.float64),
}
HARD = {"uniform with zeros": spectrum([0.0] * 3)}  # no gap at all at the edge


@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("name", [*SPECTRA, *HARD])
def test_the_smallest_eigenvectors_of_a_wide_matrix(name, scale):
    values = scale * {**SPECTRA, **HARD}[name]
    found = get_solver("min_eigen")(with_spectrum(values), RANK, seed=1)
    if name in SPECTRA:
        assert found.cost.how.startswith("cholesky")  # the way under test was taken
    least = float(values.sort().values[:RANK].sum())
    rounding = RANK * D * torch.finfo(torch.float64).eps * float(values.max())
    assert found.captured_other == pytest.approx(least, rel=1e-6, abs=rounding)
    eye = torch.eye(RANK, dtype=torch.float64)
    assert torch.linalg.matrix_norm(found.basis @ found.basis.T - eye) <= 1e-10


@settings(deadline=None, max_examples=40)
@given(
    zeros=st.integers(0, 30),
    steps=st.lists(st.floats(-10, 0), min_size=1, max_size=120),
    rank=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_smallest_equals_eigh_for_any_spectrum(zeros, steps, rank, seed):
    d = 150
    values = torch.ones(d, dtype=torch.float64)
    values[: len(steps)] = 10.0 ** torch.tensor(steps, dtype=torch.float64)
    values = values.sort().values
    values[:zeros] = 0.0
    turn, _ = torch.linalg.qr(normal(d, d, seed=seed))
    matrix = with_spectrum(values, turn)
    found = smallest(matrix, rank, seed=seed)
    captured = float(torch.trace(found.vectors.T @ matrix @ found.vectors))
    assert captured == pytest.approx(float(values[:rank].sum()), rel=1e-6, abs=1e-13 * d)
    assert float(found.values.sum()) == pytest.approx(captured, abs=1e-13 * d)
    assert bool((found.values[1:] >= found.values[:-1] - 1e-13).all())


@pytest.mark.parametrize("name", ["linear", "steep", "zeros and tiny values"])
def test_the_span_is_that_of_the_smallest_eigenvectors(name):
    values = SPECTRA[name]
    found = get_solver("min_eigen")(with_spectrum(values), RANK)
    inside = found.basis @ TURN[:, :RANK]
    assert float(torch.linalg.svdvals(inside)[-1]) >= 1 - 1e-6


def test_tasks_and_seeds_get_rows_of_their_own_in_a_wide_null_space():
    """A random pair of 8 of 500 dimensions has a mean cosine near 0.1."""
    bases = []
    for task, seed in ((0, 0), (0, 1), (1, 2)):
        turn = TURN if task == 0 else torch.linalg.qr(normal(D, D, seed=task)).Q
        matrix = with_spectrum(SPECTRA["one loud direction"], turn)
        found = get_solver("min_eigen")(matrix, RANK, seed=seed)
        assert found.cost.how.startswith("cholesky")
        bases.append(found.basis)
    for a, b in itertools.combinations(bases, 2):
        assert float(torch.linalg.svdvals(a @ b.T).mean()) < 0.3


def test_the_same_seed_gives_the_same_rows():
    matrix = with_spectrum(SPECTRA["half empty"])
    one, two = (get_solver("min_eigen")(matrix, RANK, seed=4) for _ in range(2))
    assert torch.equal(one.basis, two.basis)


OWNS = {
    "full": lambda: SecondMoment.from_matrix(
        with_spectrum(torch.logspace(-3, 0, D, dtype=torch.float64), TURN.flip(0)), 1
    ),
    "rows": lambda: RowMoment.from_rows(normal(40, D, seed=3)),
    "few rows": lambda: RowMoment.from_rows(normal(3, D, seed=3)),
    "few directions": lambda: RowMoment.from_rows(normal(30, 3, seed=4) @ normal(3, D, seed=5)),
    "silent": lambda: RowMoment.from_rows(torch.zeros(3, D, dtype=torch.float64)),
}


@pytest.mark.parametrize("own", list(OWNS))
@pytest.mark.parametrize("name", ["contrastive", "joint"])
def test_the_wide_way_of_contrastive_agrees_with_the_dense_one(name, own, monkeypatch):
    other, mine = with_spectrum(torch.logspace(-4, 0, D, dtype=torch.float64)), OWNS[own]()
    keywords = {"taken": normal(30, D, seed=8)} if name == "joint" else {}

    def solve(balance):
        return get_solver(name)(other, RANK, own=mine, balance=balance, **keywords)

    wide = {balance: solve(balance) for balance in (1e-6, 1.0)}
    assert all(found.cost.how.startswith("cholesky") for found in wide.values())
    monkeypatch.setattr(_types, "DENSE", 10**6)
    for balance in wide:
        dense = solve(balance)
        assert dense.cost.how == "eigh"
        assert wide[balance].captured_own == pytest.approx(dense.captured_own, rel=1e-6)
        assert wide[balance].captured_other == pytest.approx(dense.captured_other, rel=1e-6)


def test_few_wide_rows_never_become_a_matrix(monkeypatch):
    """A Llama down_proj has 14,336 inputs: only Gram matrices there."""
    d = 14_336
    rows = [RowMoment.from_rows(normal(12, d, seed=s)) for s in range(2)]

    def refuse(_self):
        raise AssertionError("a d_in × d_in matrix was made")

    monkeypatch.setattr(RowMoment, "matrix", property(refuse))
    for name, options in (
        ("min_eigen", {}),
        ("null_space", {"tie": "own"}),
        ("contrastive", {}),
        ("joint", {"taken": normal(8, d, seed=9)}),
    ):
        found = get_solver(name)(rows[0], 4, own=rows[1], **options)
        assert found.cost.how == "gram"
        assert found.captured_other <= 0.05 * found.total_other / d * 4
    turned = orthonormal_rows(normal(4, d, seed=5))
    assert torch.linalg.matrix_norm(turned @ turned.T - torch.eye(4).double()) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_smallest_does_not_search_for_ever_in_what_is_not_a_moment(bad):
    matrix = torch.eye(20, dtype=torch.float64)
    matrix[2, 2] = bad
    with pytest.raises(SubspaceError, match="not finite"):
        smallest(matrix, 2)

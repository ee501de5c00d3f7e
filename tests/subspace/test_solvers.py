"""Properties of every solver against torch.linalg in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import SubspaceError, UnknownNameError
from orthomerge.moments import MeanMoment, combine
from orthomerge.subspace import get_solver, list_solvers

NAMES = [s.name for s in list_solvers()]


def moment(d=24, n=60, seed=0, decay=0.8):
    g = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(d, dtype=torch.float64)
    h = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    h = h @ turn
    return h.T @ h / n


def solve(name, other, rank, **keywords):
    solver = get_solver(name)
    own = keywords.pop("own", moment(other.shape[0], seed=99))
    return solver(other, rank, own=own, **keywords)


def few(d=24, n=5, seed=0):
    return moment(d, n, seed, decay=1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_rows_are_orthonormal_and_energies_are_measured(name, rank):
    other = few() if name == "null_space" else moment()
    found = solve(name, other, rank)
    assert found.basis.shape == (rank, 24)
    gram = found.basis @ found.basis.T
    assert torch.linalg.matrix_norm(gram - torch.eye(rank, dtype=torch.float64)) <= 1e-10
    energy = torch.trace(found.basis @ other @ found.basis.T)
    assert found.captured_other == pytest.approx(float(energy), abs=1e-12)
    assert found.captured_own is not None


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 20), n=st.integers(2, 80))
def test_min_eigen_captures_the_sum_of_the_smallest_eigenvalues(seed, rank, n):
    other = moment(24, n, seed)
    found = solve("min_eigen", other, rank)
    least = torch.linalg.eigvalsh(other)[:rank].clamp_min(0).sum()
    assert found.captured_other == pytest.approx(float(least), abs=1e-6 * float(other.trace()))
    rival = solve("random_orthonormal", other, rank, seed=seed)
    assert found.captured_other <= rival.captured_other + 1e-12


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_min_eigen_follows_a_rotation_and_ignores_a_scale(seed, scale):
    other = moment(seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    turn, _ = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64))
    plain = solve("min_eigen", other, 4).basis
    turned = solve("min_eigen", scale * turn.T @ other @ turn, 4).basis
    projector = turn.T @ plain.T @ plain @ turn
    torch.testing.assert_close(turned.T @ turned, projector, atol=1e-6, rtol=0)


def test_null_space_rows_see_nothing_of_the_others():
    other = few(24, 5)
    for tie in ("random", "own"):
        found = solve("null_space", other, 8, tie=tie)
        assert found.captured_other <= 1e-14
        assert found.admissible == 19


def test_a_tie_is_broken_by_own_energy_or_by_seed():
    other, own = few(24, 5), moment(seed=7)
    best = solve("null_space", other, 4, own=own, tie="own")
    drawn = [solve("null_space", other, 4, own=own, seed=s) for s in range(5)]
    assert all(best.captured_own > d.captured_own for d in drawn)
    overlap = torch.linalg.svdvals(drawn[0].basis @ drawn[1].basis.T)
    assert float(overlap.max()) < 0.999
    again = solve("null_space", other, 4, own=own, seed=0)
    torch.testing.assert_close(again.basis, drawn[0].basis)


@pytest.mark.parametrize("name", ["min_eigen", "null_space"])
def test_different_tasks_get_different_rows_where_the_published_code_does_not(name):
    """The trap: the last rows of a full SVD of a few means are nearly the same for every task."""
    g = torch.Generator().manual_seed(0)
    d, rank = 512, 8
    means = torch.randn(8, d, generator=g, dtype=torch.float64)

    def cosine(solver: str) -> float:
        rows = []
        for t in range(2):
            others = torch.cat([means[:t], means[t + 1 :]])
            rows.append(solve(solver, others.T @ others / 7, rank, seed=t).basis)
        return float(torch.linalg.svdvals(rows[0] @ rows[1].T).mean())

    assert cosine("null_space_lapack") > 0.9
    assert cosine(name) < 0.3


def published_rows(means, rank):
    """The public code: a full SVD of the float32 means, the last right singular vectors."""
    _, _, Vh = torch.linalg.svd(means.to(torch.float32))
    return Vh.T[:, -rank:].T.double()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_lapack_rows_of_task_means_are_the_published_ones(order):
    means = [torch.randn(200, generator=torch.Generator().manual_seed(t)) + 1 for t in order]
    moments = [MeanMoment(200).update(m.repeat(3, 1)) for m in means]
    solver = get_solver("null_space_lapack")
    for t in range(5):
        others = [u for u in range(5) if u != t]
        published = published_rows(torch.stack([means[u] for u in others]), 4)
        other = combine([moments[u] for u in others])
        torch.testing.assert_close(solver(other, 4).basis, published, atol=1e-5, rtol=0)
        made = solver(other, 4, of="moment").basis  # the same moment, and another basis
        assert float((made.T @ made - published.T @ published).norm()) > 0.1
    with pytest.raises(SubspaceError, match="unknown of 'means'"):
        solver(moments[0], 4, of="means")


def test_contrastive_is_louder_on_its_own_task_than_min_eigen():
    other, own = moment(seed=1), moment(seed=2)
    silent = solve("min_eigen", other, 4, own=own)
    loud = solve("contrastive", other, 4, own=own)
    # The generalised Rayleigh quotient it maximises, over the same ridge for both.
    ridge = 0.01 * float(other.trace()) / 24

    def quotient(found):
        a = found.basis
        noise = a @ (other + ridge * torch.eye(24, dtype=torch.float64)) @ a.T
        return float(torch.trace(torch.linalg.solve(noise, a @ own @ a.T)))

    assert quotient(loud) > quotient(silent)
    assert loud.captured_own > silent.captured_own
    plain = solve("contrastive", other, 4, own=own, balance=1e9)
    top = torch.linalg.eigvalsh(own)[-4:].sum()
    assert plain.captured_own == pytest.approx(float(top), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: solve("null_space", moment(), 8), "leave 0 of 24"),
        (lambda: solve("min_eigen", moment(), 25), "does not fit"),
        (lambda: get_solver("min_eigen")(torch.zeros(3, 4), 2), "square"),
        (lambda: solve("min_eigen", torch.full((4, 4), float("nan")), 2, own=None), "NaN"),
        (lambda: solve("min_eigen", moment(), 2, own=moment(12)), "differ"),
        (lambda: solve("contrastive", moment(), 2, own=None), "--own"),
        (lambda: solve("contrastive", moment(), 2, balance=0.0), "positive"),
        (lambda: solve("null_space", few(), 2, own=None, tie="own"), "--own"),
        (lambda: solve("null_space", few(), 2, tie="lapack"), "valid: random, own"),
        (lambda: solve("contrastive", moment(), 2, balanc=1.0), "did you mean 'balance'"),
    ],
)
def test_what_cannot_be_solved_is_said(call, word):
    with pytest.raises(SubspaceError, match=word):
        call()


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'min_eigen'"):
        get_solver("min_eigne")

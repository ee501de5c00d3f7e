"""Overlap from factors equals the dense definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthomerge.adapters import Adapter
from orthomerge.diagnostics import overlap
from orthomerge.factors import LoraFactors


def layer(seed, rank=3, d_in=9, d_out=7, scaling=1.5):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return LoraFactors(A, B, scaling)


def mean_squared_cosine(X, Y):
    """Of the principal angles between the columns' spans, by QR and SVD."""
    cosines = torch.linalg.svdvals(torch.linalg.qr(X).Q.T @ torch.linalg.qr(Y).Q)
    return float(cosines.square().mean())


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_every_figure_equals_its_dense_definition(seed, first, second):
    x, y = layer(seed, first), layer(seed + 1, second, scaling=0.3)
    found = overlap([Adapter("x", {"l": x}), Adapter("y", {"l": y})])
    dx, dy = x.delta(), y.delta()
    assert float(found.cosine[0, 1]) == pytest.approx(
        float((dx * dy).sum() / (dx.norm() * dy.norm())), abs=1e-9
    )
    assert found.norms.tolist() == pytest.approx([float(dx.norm()), float(dy.norm())])
    assert float(found.row_space[0, 1]) == pytest.approx(mean_squared_cosine(x.A.T, y.A.T))
    assert float(found.column_space[1, 0]) == pytest.approx(mean_squared_cosine(x.B, y.B))
    product = dx * dy
    conflict = product[product < 0].abs().sum() / product.abs().sum()
    assert float(found.sign_conflict[0, 1]) == pytest.approx(float(conflict))
    for rank, dense in zip(found.effective_rank.tolist(), (dx, dy), strict=True):
        s = torch.linalg.svdvals(dense)
        p = s[s > 1e-12] / s.sum()
        assert rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)
    for square in (found.cosine, found.row_space, found.column_space, found.sign_conflict):
        torch.testing.assert_close(square, square.T)
    torch.testing.assert_close(found.row_space.diagonal(), torch.ones(2, dtype=torch.float64))


def test_starts_drawn_under_one_seed_are_told_from_others():
    first, apart = layer(1, 8, 200), layer(2, 8, 200)
    g = torch.Generator().manual_seed(5)
    drift = 0.2 * torch.randn(8, 200, generator=g, dtype=torch.float64)
    same = LoraFactors(first.A + drift, layer(3, 8, 200).B)
    found = overlap(
        [Adapter(n, {"l": f}) for n, f in zip("abc", (first, same, apart), strict=True)]
    )
    assert found.shared_starts == [(0, 1)]
    assert float(found.start_alike[0, 2]) < 0.2


def test_layers_of_one_adapter_alone_and_zero_updates_leave_figures_finite():
    silent = LoraFactors(layer(1).A, torch.zeros(7, 3, dtype=torch.float64))
    found = overlap([Adapter("a", {"l": layer(1), "m": layer(2)}), Adapter("b", {"l": silent})])
    for figure in (found.cosine, found.row_space, found.column_space, found.sign_conflict):
        assert bool(torch.isfinite(figure).all())
    assert float(found.cosine[0, 1]) == 0.0
    assert float(found.column_space[0, 1]) == 0.0
    # The row spaces are compared where both are: one layer, the same A.
    assert float(found.row_space[0, 1]) == pytest.approx(1.0)
    assert float(found.effective_rank[1]) == 0.0

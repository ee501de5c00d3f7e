from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors, energy, from_dense, inner, truncate, weighted_sum
from orthomerge.moments import SecondMoment


def factors(rank=3, d_out=7, d_in=9, seed=0, scaling=2.0):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, d_in, generator=g, dtype=torch.float64),
        torch.randn(d_out, rank, generator=g, dtype=torch.float64),
        scaling,
    )


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_the_weighted_sum_is_the_sum_of_dense_updates(ranks, weights):
    parts = [factors(r, seed=i, scaling=0.5 + i) for i, r in enumerate(ranks)]
    dense = sum(w * p.delta() for p, w in zip(parts, weights, strict=False))
    torch.testing.assert_close(weighted_sum(parts, weights[: len(parts)]).delta(), dense)


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 12), keep=st.integers(1, 12))
def test_truncation_is_the_best_of_its_rank(rank, keep):
    item = factors(rank)
    cut = truncate(item, keep)
    _, s, _ = torch.linalg.svd(item.delta())
    error = torch.linalg.matrix_norm(item.delta() - cut.delta())
    assert cut.rank <= keep
    torch.testing.assert_close(error, s[keep:].norm(), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(from_dense(item.delta(), keep).delta(), cut.delta())


def test_inner_and_energy_equal_their_dense_forms():
    a, b = factors(2, seed=1), factors(4, seed=2, scaling=0.3)
    assert inner(a, b) == pytest.approx(float((a.delta() * b.delta()).sum()))
    h = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    S = h.T @ h / 20
    assert energy(a, SecondMoment.from_matrix(S, 20)) == pytest.approx(
        float((h @ a.delta().T).square().sum() / 20)
    )


def test_factors_that_do_not_pair_are_refused():
    with pytest.raises(AdapterError, match="do not share a rank"):
        LoraFactors(torch.zeros(3, 4), torch.zeros(5, 2))

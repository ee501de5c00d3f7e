from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import AdapterError
from orthomerge.factors import (
    LoraFactors,
    energy,
    from_dense,
    inner,
    truncate,
    truncate_measured,
    weighted_sum,
)
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


@settings(deadline=None, max_examples=30)
@given(
    rank=st.integers(1, 12), keep=st.integers(1, 12), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_truncation_from_gram_matrices_is_as_good_as_the_dtype(rank, keep, dtype):
    """Factors below float64 take another way; a repeated row makes them rank deficient as well."""
    item = factors(rank).to(getattr(torch, dtype))
    item = LoraFactors(torch.cat([item.A, item.A[:1]]), torch.cat([item.B, item.B[:, :1]], 1), 2.0)
    cut, lost = truncate_measured(item.to(torch.float32), keep)
    exact = item.to(torch.float64).delta()
    _, s, _ = torch.linalg.svd(exact)
    error = torch.linalg.matrix_norm(exact - cut.to(torch.float64).delta())
    assert float(error) == pytest.approx(float(s[keep:].norm()), rel=1e-5, abs=1e-5 * float(s[0]))
    assert lost == pytest.approx(float(s[keep:].norm() / s.norm()), rel=1e-5, abs=1e-6)


def test_truncating_nothing_gives_nothing():
    for dtype in (torch.float32, torch.float64):
        zero = LoraFactors(torch.zeros(3, 9, dtype=dtype), torch.zeros(7, 3, dtype=dtype))
        cut, lost = truncate_measured(zero, 2)
        assert not cut.delta().any() and cut.delta().isfinite().all() and lost == 0.0

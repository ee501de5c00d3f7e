"""Sparsifiers, consensus and spaces: the properties the methods rest on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging import linear, merge_layers
from orthomerge.merging.parts import consensus
from orthomerge.merging.parts.consensus import (
    SIGN_METHODS,
    disjoint_mean,
    elect_and_mean,
    majority_sign,
)
from orthomerge.merging.parts.lowrank import polar, thin_svd, truncate_dense, truncate_nearly
from orthomerge.merging.parts.sparsify import band, magprune, random_drop, trim


def draw(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


few = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@few
@given(seeds, st.floats(0.01, 1.0), st.integers(1, 9), st.integers(1, 9))
def test_trim_keeps_the_floor_of_its_share_and_the_largest(seed, density, rows, columns):
    x = draw(seed, rows, columns)
    y = trim(x, density)
    kept = y != 0
    assert int(kept.sum()) == (int(density * x.numel()) if density < 1 else x.numel())
    assert torch.equal(y[kept], x[kept])
    if kept.any() and (~kept).any():
        assert x[kept].abs().min() >= x[~kept].abs().max()


def test_trim_breaks_ties_by_count_not_by_threshold():
    assert int((trim(torch.ones(10), 0.3) != 0).sum()) == 3


@few
@given(seeds, st.floats(0.01, 1.0), st.integers(1, 40), st.sampled_from([1, 3, 1000]))
def test_trim_of_sizes_that_repeat_keeps_the_earlier_and_writes_where_told(
    seed, density, size, levels
):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (size,), generator=g).to(torch.float32)
    order = x.abs().argsort(descending=True, stable=True)[: int(density * size)]
    expected = torch.zeros_like(x)
    expected[order] = x[order]
    assert torch.equal(trim(x, density), x if density >= 1 else expected)
    held = x.clone()
    assert trim(held, density, out=held) is held
    assert torch.equal(held, x if density >= 1 else expected)


@pytest.mark.parametrize("method", SIGN_METHODS)
def test_election_in_pieces_is_election_at_once(monkeypatch, method):
    updates, weights = draw(3, 4, 7, 5), draw(4, 4)
    whole = disjoint_mean(updates, weights, majority_sign(updates, method))
    for size in (1, 45, 10**6):
        monkeypatch.setattr(consensus, "_IN_CACHE", size)
        assert torch.equal(elect_and_mean(method)(updates, weights), whole)


def test_band_drops_both_ends():
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]])
    assert band(x, 0.5, 0.2).tolist() == [[0, 0, 0, -4, 5, -6, 7, -8, 0, 0]]
    assert torch.equal(band(x, 1.0, 0.0), x)


@pytest.mark.parametrize(
    "drop",
    [lambda x, g: random_drop(x, 0.3, g), lambda x, g: magprune(x, 0.3, 0.2, g)],
    ids=["random_drop", "magprune"],
)
def test_dropping_is_unbiased(drop):
    x = draw(0, 4, 6)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([drop(x, g) for _ in range(4000)])
    error = draws.std(dim=0) / 4000**0.5
    assert ((draws.mean(dim=0) - x).abs() < 5 * error + 1e-12).all()


def test_magprune_keeps_large_entries_more_often():
    x = torch.arange(1, 101, dtype=torch.float64).repeat(400, 1)
    kept = (magprune(x, 0.5, 0.8, torch.Generator().manual_seed(0)) != 0).double().mean(dim=0)
    assert kept[:10].mean() == pytest.approx(0.14, abs=0.04)
    assert kept[-10:].mean() == pytest.approx(0.86, abs=0.04)


def test_the_mask_does_not_depend_on_the_dtype():
    x = draw(0, 20, 20)
    masks = [
        random_drop(x.to(dtype), 0.5, torch.Generator().manual_seed(1)) != 0
        for dtype in (torch.float32, torch.float64)
    ]
    assert torch.equal(*masks)


def test_election_and_mean_by_hand():
    updates = torch.tensor([[3.0, -1.0, 0.0, 1.0], [-1.0, -1.0, 2.0, 1.0], [-1.0, 3.0, 0.0, -2.0]])
    total = majority_sign(updates, "total")
    assert total.tolist() == [1, 1, 1, 1]
    frequency = majority_sign(updates, "frequency")
    assert frequency.tolist() == [-1, -1, 1, 1]
    weights = torch.tensor([1.0, 2.0, 4.0])
    assert disjoint_mean(updates, weights, total).tolist() == [3.0, 12.0, 4.0, 1.5]
    assert disjoint_mean(updates, weights, frequency).tolist() == [-3.0, -1.5, 4.0, 1.5]


@few
@given(
    seeds,
    st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3), st.floats(-2, 2)), min_size=1),
)
def test_linear_is_the_exact_sum_for_any_ranks_scalings_and_weights(seed, rows):
    factors = [
        LoraFactors(draw(seed + i, r, 6), draw(seed - i, 5, r), s)
        for i, (r, s, _) in enumerate(rows[:5])
    ]
    weights = [w for _, _, w in rows[:5]]
    dense = sum(w * f.delta() for f, w in zip(factors, weights, strict=True))
    merged = linear(factors, weights)
    assert merged.rank == sum(f.rank for f in factors)
    assert torch.allclose(merged.delta(), dense, atol=1e-10)


def test_thin_svd_leaves_out_directions_given_twice():
    f = LoraFactors(draw(1, 3, 7), draw(2, 5, 3), -2.0)
    U, s, Vh = thin_svd(weighted_sum([f, f], [1.0, 1.0]))
    assert s.shape == (3,)
    assert torch.allclose(U * s @ Vh, 2 * f.delta())
    assert torch.allclose(U.T @ U, torch.eye(3, dtype=U.dtype))


def test_polar_is_the_inverse_square_root_form():
    X = draw(3, 8, 4)
    values, vectors = torch.linalg.eigh(X.T @ X)
    whitened = X @ (vectors * values.rsqrt()) @ vectors.T
    assert torch.allclose(polar(X, X.dtype), whitened)


@pytest.mark.parametrize("shape", [(300, 260), (240, 400)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_dense_update_is_cut_as_well_as_by_a_full_decomposition(shape, decay):
    """Also where no gap follows the wanted directions: what is lost is then the same."""
    g = torch.Generator().manual_seed(0)
    columns = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -decay
    update = torch.randn(*shape, generator=g, dtype=torch.float64) * columns
    part, lost = truncate_dense(update, 4)
    s = torch.linalg.svdvals(update)
    error = float((update - part.delta()).norm())
    assert part.rank == 4
    assert error == pytest.approx(float(s[4:].norm()), rel=1e-6)
    assert lost == pytest.approx(error / float(update.norm()), rel=1e-6)


def test_cutting_a_low_rank_or_zero_dense_update_is_exact():
    g = torch.Generator().manual_seed(1)
    low = torch.randn(300, 3, generator=g) @ torch.randn(3, 280, generator=g)
    part, lost = truncate_dense(low, 6)
    assert lost < 1e-5 and torch.allclose(part.delta(), low, atol=1e-4)
    part, lost = truncate_dense(torch.zeros(300, 280), 6)
    assert lost == 0.0 and not part.delta().any()


def test_trim_keeps_the_exact_number_where_entries_are_equal():
    update = torch.tensor([[1.0, -1.0, 1.0], [2.0, -1.0, 0.0]])
    assert trim(update, 0.5).tolist() == [[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]]
    assert not trim(update, 0.1).any()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
@pytest.mark.parametrize("method, options", [("ties", {}), ("dare_linear", {"density": 0.3})])
def test_a_cut_to_the_sum_of_the_ranks_loses_hardly_more_than_the_best_one(shape, method, options):
    d_out, d_in = shape
    parts = [random_factors(seed, 3 + seed, d_out, d_in) for seed in range(3)]
    update = merge_layers([{"q": f} for f in parts], method=method, weights=1.0, **options)
    update = update.dense("q").double()
    part, lost = truncate_nearly(update, 12, parts)
    assert part.rank == 12
    norm = torch.linalg.norm(update)
    assert float(torch.linalg.norm(update - part.delta()) / norm) == pytest.approx(lost, rel=1e-6)
    least = float(torch.linalg.norm(torch.linalg.svdvals(update)[12:]) / norm)
    assert 0.1 < least <= lost * (1 + 1e-9) <= least * 1.001


def test_a_cut_to_the_sum_of_the_ranks_loses_nothing_where_there_is_nothing_to_lose():
    parts = [random_factors(seed, 2, 200, 160) for seed in range(3)]
    update = sum(f.delta() for f in parts)
    part, lost = truncate_nearly(update, 6, parts)
    assert lost < 1e-7
    assert torch.allclose(part.delta(), update, atol=1e-9)
    part, lost = truncate_nearly(torch.zeros(200, 160), 6, parts)
    assert lost == 0 and not part.delta().any()


def random_factors(seed: int, rank: int, d_out: int, d_in: int) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=g, dtype=torch.float64) / d_in**0.5
    return LoraFactors(A, torch.randn(d_out, rank, generator=g, dtype=torch.float64), 0.5)

"""Solvers on hard statistics, against torch.linalg in float64; tolerances as docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import SubspaceError
from orthomerge.moments import RowMoment, SecondMoment, leave_one_out
from orthomerge.subspace import contrast, get_solver, list_solvers

EPS = torch.finfo(torch.float64).eps
NAMES = [s.name for s in list_solvers()]
# The span is a function of the energies, so it turns with the features.
FOLLOWS = ["min_eigen", "contrastive", "joint"]
ORDER = 1e-10


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def turn(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, d, seed=seed))[0]


def moment(values: torch.Tensor, seed: int) -> torch.Tensor:
    Q = turn(len(values), seed)
    S = (Q * values) @ Q.T
    return (S + S.T) / 2


def solve(name, other, rank, own, **more):
    return get_solver(name)(other, rank, own=own, **more)


def assert_sound(found, rank):
    eye = torch.eye(rank, dtype=torch.float64)
    assert bool(found.basis.isfinite().all())
    assert float((found.basis @ found.basis.T - eye).norm()) <= ORDER


dims = st.integers(4, 24)
seeds = st.integers(0, 10_000)
scales = st.floats(-8, 8).map(lambda e: 10.0**e)


@pytest.mark.parametrize("name", FOLLOWS)
@settings(deadline=None, max_examples=30)
@given(d=dims, seed=seeds, scale=scales, order=st.randoms(use_true_random=False))
def test_rotation_scale_order_and_batches(name, d, seed, scale, order):
    """Of any features: turned by Q the subspace turns, and nothing else changes it."""
    rank, count = max(1, d // 4), 3 * d
    tasks = [gaussian(count, d, seed=seed + t) * 0.7 ** torch.arange(d) for t in range(3)]
    own = gaussian(count, d, seed=seed + 9) * 0.8 ** torch.arange(d).flip(0)
    Q = turn(d, seed + 1)

    def span(parts, mine):
        whole = torch.cat(parts)
        found = solve(name, whole.T @ whole / len(whole), rank, mine.T @ mine / len(mine))
        return found.basis.T @ found.basis

    plain = span(tasks, own)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(span([h @ Q for h in tasks], own @ Q), Q.T @ plain @ Q, **close)
    torch.testing.assert_close(span([h * scale for h in tasks], own * scale), plain, **close)
    mixed = order.sample(tasks, 3)
    torch.testing.assert_close(span(mixed, own), plain, **close)
    batches = SecondMoment(d)
    for rows in torch.cat(mixed).split(order.randint(1, count)):
        batches.update(rows)
    found = solve(name, batches.matrix, rank, own.T @ own / count)
    torch.testing.assert_close(found.basis.T @ found.basis, plain, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=15)
@given(d=dims, n=st.integers(1, 60), seed=seeds)
def test_narrow_features_are_summed_wide(dtype, d, n, seed):
    """The moment of rounded rows is that of the same rows in float64."""
    rows = gaussian(n, d, seed=seed).to(dtype)
    wide = rows.double()
    for kind in (SecondMoment(d).update(rows), RowMoment.from_rows(rows)):
        torch.testing.assert_close(kind.matrix, wide.T @ wide / n, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [32, 96])
def test_condition_numbers(name, condition, d):
    other = moment(torch.logspace(0, -float(torch.tensor(condition).log10()), d).double(), 1)
    own = moment(torch.logspace(-3, 0, d).double(), 2)
    if name == "null_space" and condition < 1e12:
        with pytest.raises(SubspaceError, match="'min_eigen'"):
            solve(name, other, 4, own)
        return
    found = solve(name, other, 4, own)
    assert_sound(found, 4)
    if name == "null_space":  # its tolerance: 1e-10 of the largest energy is nothing
        assert found.captured_other <= 4e-10 * float(other.trace())
    if name == "min_eigen":
        least = float(torch.linalg.eigvalsh(other)[:4].sum())
        assert abs(found.captured_other - least) <= 4 * d * EPS * float(other.trace())


@pytest.mark.parametrize("rank", [1, 2, 64, 511, 512])
@pytest.mark.parametrize("name", ["min_eigen", "contrastive", "random_orthonormal"])
def test_ranks_to_512(name, rank):
    h, k = gaussian(600, 512, seed=1), gaussian(600, 512, seed=2)
    other, own = h.T @ h / 600, k.T @ k / 600
    found = solve(name, other, rank, own)
    assert_sound(found, rank)
    if name == "min_eigen":
        least = float(torch.linalg.eigvalsh(other)[:rank].sum())
        assert found.captured_other == pytest.approx(least, rel=1e-6, abs=1e-10)
    if rank == 512:
        assert found.captured_other == pytest.approx(float(other.trace()))


@pytest.mark.parametrize("form", ["rows", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_tasks_of_one_sample_each(name, form):
    """Tasks × rank is far more than the layer is wide."""
    d, tasks = 120, 100
    rows = [gaussian(1, d, seed=t) for t in range(tasks)]
    form_of = RowMoment.from_rows if form == "rows" else lambda h: SecondMoment(d).update(h)
    moments = [form_of(h) for h in rows]
    if name == "joint":
        moments = moments[:25]  # still more rows in all than dimensions
    found = get_solver(name).for_all(moments, [8] * len(moments))
    for t, other in list(enumerate(leave_one_out(moments)))[::20]:
        assert_sound(found[t], 8)
        seen = float(torch.trace(found[t].basis @ other.matrix @ found[t].basis.T))
        assert found[t].captured_other == pytest.approx(seen, abs=1e-12 * other.trace)
        if name in ("min_eigen", "null_space"):
            assert seen <= 1e-12 * other.trace


@pytest.mark.parametrize("n", [1, 5, 200])
@pytest.mark.parametrize("form", ["rows", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_tasks_that_are_alike_have_nothing_of_their_own(name, form, n):
    """The others' features are the own ones: no subspace separates them, and contrast says so."""
    d, rank = 40, 4
    h = gaussian(n, d, seed=3) * 0.9 ** torch.arange(d)
    form_of = RowMoment.from_rows if form == "rows" else lambda x: SecondMoment(d).update(x)
    one, same = form_of(h), form_of(h)
    if name == "null_space" and n > d:
        with pytest.raises(SubspaceError, match="leave 0 of 40 dimensions free"):
            solve(name, same, rank, one)
        return
    found = solve(name, same, rank, one)
    assert_sound(found, rank)
    assert found.captured_own == pytest.approx(found.captured_other, abs=1e-12 * one.trace)
    seen = contrast([found])
    assert seen is None or seen == pytest.approx(1.0, rel=1e-6)
    if name == "contrastive" and n > d:
        # What is left to choose by is the own energy alone.
        top = torch.linalg.eigvalsh(one.matrix)[-rank:].sum()
        assert found.captured_own == pytest.approx(float(top), rel=1e-9)


def test_contrast_of_tasks_that_differ():
    h, k = gaussian(200, 40, seed=1), gaussian(200, 40, seed=2)
    scale = 0.8 ** torch.arange(40)
    other, own = SecondMoment(40).update(h * scale), SecondMoment(40).update(k * scale.flip(0))
    assert contrast([solve("contrastive", other, 4, own)] * 2) > 10
    assert contrast([solve("min_eigen", other, 4, None)]) is None

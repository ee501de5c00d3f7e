"""Tasks taken together and left out, and the choice of a representation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import StatisticsError
from orthomerge.moments import (
    DEFAULT_BUDGET,
    KINDS,
    MeanMoment,
    Representation,
    RowMoment,
    SecondMoment,
    SketchMoment,
    choose,
    combine,
    leave_one_out,
)

DIM = 30


def rows_of(n, seed, d=DIM):
    g = torch.Generator().manual_seed(500 + seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * 10.0 ** (seed % 3)


MAKE = {
    "full": lambda h: SecondMoment(h.shape[1]).update(h),
    "rows": lambda h: RowMoment.from_rows(h),
    "sketch": lambda h: SketchMoment(h.shape[1], 8).update(h),
    "mean": lambda h: MeanMoment(h.shape[1]).update(h),
}
# Few rows stay rows; many are summed as matrices; mixtures go the way the full one needs.
SETS = {
    "full": ["full"] * 4,
    "few rows": ["rows"] * 4,
    "sketches": ["sketch"] * 3,
    "means": ["mean"] * 5,
    "rows and sketches": ["rows", "sketch", "rows"],
    "a mixture": ["rows", "full", "sketch"],
    "two": ["rows", "full"],
}


def moments_of(name, n=6):
    return [MAKE[kind](rows_of(n, seed)) for seed, kind in enumerate(SETS[name])]


def weighted(moments, weights):
    total = sum(weights)
    return sum(w / total * m.matrix for w, m in zip(weights, moments, strict=True))


def close(found, expected, tolerance=1e-12):
    assert torch.linalg.matrix_norm(found - expected) <= tolerance * torch.linalg.matrix_norm(
        expected
    )


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.parametrize("n", [2, 6, 40])
@pytest.mark.parametrize("weights", [None, "unlike", "with a zero"])
def test_combined_moments_are_the_dense_weighted_sums(name, n, weights):
    moments = moments_of(name, n)
    values = [1.0] * len(moments)
    if weights == "unlike":
        values = [0.5 + i for i in range(len(moments))]
    elif weights == "with a zero":
        values = [3.0, 0.0, *values[2:]] if len(moments) > 2 else [1.0, 2.0]
    given_weights = None if weights is None else values
    found = combine(moments, given_weights)
    close(found.matrix, weighted(moments, values))
    assert found.count == sum(m.count for m in moments)
    rests = leave_one_out(moments, given_weights)
    assert len(rests) == len(moments)
    for t, rest in enumerate(rests):
        others = [m for u, m in enumerate(moments) if u != t]
        left = [v for u, v in enumerate(values) if u != t]
        expected = weighted(others, left)
        close(rest.matrix, expected)
        close(rest.matrix, combine(others, left).matrix)
        assert rest.trace == pytest.approx(float(expected.trace()), rel=1e-12)
        assert rest.count == sum(m.count for m in others)
        if isinstance(rest, RowMoment):
            close(rest.gram, rest.factor @ rest.factor.T)


def test_few_rows_stay_rows_and_many_become_a_matrix():
    few = moments_of("few rows", 6)
    assert isinstance(combine(few), RowMoment)
    assert all(isinstance(m, RowMoment) for m in leave_one_out(few))
    assert isinstance(combine(moments_of("few rows", 8)), SecondMoment)
    assert isinstance(combine(moments_of("a mixture")), SecondMoment)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(4)), scale=st.floats(1e-6, 1e6))
def test_neither_the_order_nor_the_scale_of_the_weights_matters(order, scale):
    for name in ("full", "few rows"):
        moments, weights = moments_of(name), [0.1, 2.0, 1.0, 0.5]
        plain = combine(moments, weights).matrix
        other = combine([moments[i] for i in order], [scale * weights[i] for i in order])
        close(other.matrix, plain)


def test_a_quiet_task_beside_a_loud_one_keeps_its_digits():
    """Leaving the loud one out must not leave its rounding behind."""
    quiet = [SecondMoment(DIM).update(rows_of(40, 3 * s)) for s in range(1, 3)]
    loud = SecondMoment(DIM).update(rows_of(40, 9) * 1e8)
    rest = leave_one_out([quiet[0], loud, quiet[1]])[1]
    close(rest.matrix, weighted(quiet, [1.0, 1.0]))
    rest = leave_one_out([quiet[0], loud, quiet[1]], [1.0, 1e14, 3.0])[1]
    close(rest.matrix, weighted(quiet, [1.0, 3.0]))


@pytest.mark.parametrize("name", ["full", "rows"])
def test_combined_moments_are_as_honest_as_their_parts(name):
    rows = [rows_of(40, 3 * s) for s in range(3)]
    lossy = SketchMoment(DIM, 6).update(rows[0])
    exact = [MAKE[name](h) for h in rows[1:]]
    truth = sum(h.T @ h / 40 for h in rows) / 3
    total = combine([lossy, *exact])
    gap = torch.linalg.eigvalsh(truth - total.matrix)
    assert not total.exact
    assert float(gap[0]) >= -1e-12
    assert float(gap[-1]) <= total.slack + 1e-12
    assert total.slack == pytest.approx(lossy.slack / 3)
    rests = leave_one_out([lossy, *exact])
    assert rests[0].exact
    assert rests[0].slack == 0.0
    assert not rests[1].exact
    assert rests[1].slack == pytest.approx(lossy.slack / 2)
    sampled = RowMoment(DIM, 5).update(rows[0])
    assert combine([sampled, *exact]).slack is None
    assert not combine([sampled, *exact]).exact


@pytest.mark.parametrize("function", [combine, leave_one_out])
@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ([1.0, -0.5, 1.0], "not negative"),
        ([0.0, 0.0, 0.0], "all zero"),
        ([1.0, math.inf, 1.0], "finite"),
        ([1.0, math.nan, 1.0], "finite"),
        ([1.0, 1.0], "2 weights for 3"),
        ([1.0] * 4, "4 weights for 3"),
        ([], "0 weights for 3"),
    ],
)
def test_weights_that_are_none_are_refused(function, weights, word):
    with pytest.raises(StatisticsError, match=word):
        function(moments_of("full")[:3], weights)


def test_what_cannot_be_combined_is_said():
    with pytest.raises(StatisticsError, match="no moment to combine"):
        combine([])
    with pytest.raises(StatisticsError, match="at least two"):
        leave_one_out(moments_of("full")[:1])
    with pytest.raises(StatisticsError, match="others have none"):
        leave_one_out(moments_of("full"), [1.0, 0.0, 0.0, 0.0])
    other = SecondMoment(4).update(torch.ones(2, 4))
    with pytest.raises(StatisticsError, match=r"widths \[4, 30\]"):
        combine([*moments_of("full"), other])


# ------------------------------------------------------------------ choose

BLOCK = {  # one block of Llama-8B: width of the input, outputs of all layers that read it
    "qkv": (4096, 4096 + 1024 + 1024),
    "o": (4096, 4096),
    "up": (4096, 2 * 14336),
    "down": (14336, 4096),
}
LLAMA = {f"{i}.{k}": v for i in range(32) for k, v in BLOCK.items()}
MINILM = {f"{i}.{k}": (384, o) for i in range(6) for k, o in [("qkv", 1152), ("o", 384)]}


@pytest.mark.parametrize(
    ("inputs", "representation", "expected"),
    [
        # Cheap beside the layers and small: full.
        (MINILM, {}, {"full"}),
        ({"a": (384, 384)}, {}, {"full"}),
        # One output short of its width: rows, though it would fit.
        ({"a": (384, 383)}, {}, {"rows"}),
        # A full moment of 8 d² bytes must fit to the byte, else rows of 4 · rows · d.
        ({"a": (100, 100)}, {"budget": 80_000, "rows": 10}, {"full"}),
        ({"a": (100, 100)}, {"budget": 79_999, "rows": 10}, {"rows"}),
        ({"a": (100, 100)}, {"budget": 4_000, "rows": 10}, {"rows"}),
        ({"a": (100, 100)}, {"budget": 3_999, "rows": 10}, {"sketch"}),
        # All of one model: 32 · 3 · 8 · 4096² bytes are too many, 1,024 rows each as well.
        (LLAMA, {}, {"sketch"}),
        (LLAMA, {"rows": 100}, {"rows"}),
        # With room for the full moments of 4,096 only the wide down_proj is left.
        (LLAMA, {"budget": 16 << 30}, {"full", "rows"}),
        (LLAMA, {"budget": 13 << 30}, {"full", "sketch"}),
        # Asked for by name there is nothing to choose.
        (LLAMA, {"kind": "full"}, {"full"}),
        (MINILM, {"kind": "sketch", "budget": 1}, {"sketch"}),
        ({}, {}, set()),
    ],
)
def test_the_kind_follows_cost_and_budget(inputs, representation, expected):
    found = choose(inputs, Representation(**representation))
    assert set(found) == set(inputs)
    assert set(found.values()) == expected
    assert all(not (kind == "full" and "down" in name) or representation.get("kind") == "full"
               for name, kind in found.items())  # fmt: skip


def test_what_auto_chooses_fits_the_budget():
    for budget in (1 << 20, 1 << 28, DEFAULT_BUDGET, 8 << 30, 14 << 30, 64 << 30):
        wanted = Representation(budget=budget)
        found = choose(LLAMA, wanted)
        widths = [(kind, LLAMA[name][0]) for name, kind in found.items()]
        full = sum(8 * d * d for kind, d in widths if kind == "full")
        rows = sum(4 * wanted.rows * d for kind, d in widths if kind == "rows")
        assert full + rows <= budget  # sketches are the last resort and take what they take


def test_a_representation_makes_what_it_says():
    wanted = Representation(rows=5, size=3)
    for kind in KINDS[1:]:
        assert wanted.new(kind, 7).kind == kind
        assert wanted.new(kind, 7).dim == 7
    assert wanted.new("rows", 7).update(torch.ones(9, 7)).kept == 5
    assert wanted.new("sketch", 7).size == 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kind": "sketchy"}, "did you mean 'sketch'"),
        ({"rows": 0}, "at least 1"),
        ({"size": 0}, "at least 1"),
        ({"budget": -1}, "at least 1"),
    ],
)
def test_a_representation_that_is_none_is_refused(changes, word):
    with pytest.raises(StatisticsError, match=word):
        choose(MINILM, Representation(**changes))

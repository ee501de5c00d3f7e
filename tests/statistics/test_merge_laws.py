"""Statistics add up: merging is one pass over everything, in any order and grouping."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import StatisticsError
from orthomerge.moments import MeanMoment, Moment, RowMoment, SecondMoment, SketchMoment
from orthomerge.statistics import Statistics, StatisticsMeta, merge_statistics

DIM = 6
SIZE = 3
MAKERS = {
    "full": lambda: SecondMoment(DIM),
    "rows": lambda: RowMoment(DIM, 64),
    "sketch": lambda: SketchMoment(DIM, SIZE),
    "mean": lambda: MeanMoment(DIM),
}
EXACT = ["full", "rows", "mean"]


def over(rows, kind: str) -> Statistics:
    moments: dict[str, Moment] = {
        name: MAKERS[kind]().update(rows * scale) for name, scale in (("a", 1.0), ("b", 100.0))
    }
    meta = StatisticsMeta("tiny", "c", ["x"], "token", samples=len(rows))
    return Statistics(moments, {"a": "a", "a2": "a", "b": "b"}, meta)


def matrix(statistics: Statistics, layer: str):
    return statistics.second_moment(layer)


def assert_equal(one: Statistics, two: Statistics):
    assert one.meta == two.meta
    assert one.layers == two.layers
    for layer in one.layers:
        assert one.moment(layer).count == two.moment(layer).count
        torch.testing.assert_close(matrix(one, layer), matrix(two, layer), rtol=1e-9, atol=1e-9)


@st.composite
def parts(draw, least=2):
    sizes = draw(st.lists(st.integers(1, 12), min_size=least, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    # Columns of very different size, and at times rows that all lie in one direction.
    scale = torch.tensor([1.0, 1.0, 10.0, 0.1, 1e-3, draw(st.sampled_from([0.0, 1.0]))])
    return [torch.randn(n, DIM, generator=generator) * scale for n in sizes]


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None, max_examples=40)
@given(chunks=parts())
def test_merging_is_one_pass_over_everything(kind, chunks):
    assert_equal(merge_statistics([over(p, kind) for p in chunks]), over(torch.cat(chunks), kind))


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None, max_examples=40)
@given(chunks=parts(least=3))
def test_merging_is_associative_and_commutative(kind, chunks):
    a, b, *rest = [over(p, kind) for p in chunks]
    c = merge_statistics(rest)
    assert_equal((a + b) + c, a + (b + c))
    assert_equal(a + b, b + a)


@settings(deadline=None, max_examples=40)
@given(chunks=parts(), turn=st.booleans())
def test_merged_sketches_keep_their_bound_in_any_order(chunks, turn):
    ordered = chunks[::-1] if turn else chunks
    merged = reduce(lambda a, b: a + b, [over(p, "sketch") for p in ordered])
    whole = over(torch.cat(chunks), "full")
    for layer in ("a", "b"):
        exact, sketch = matrix(whole, layer), merged.moment(layer)
        left = torch.linalg.eigvalsh(exact - sketch.matrix)
        values = torch.linalg.eigvalsh(exact).flip(0)
        room = 1e-9 * float(values[0])
        assert float(left[0]) >= -room
        assert float(left[-1]) <= sketch.slack + room
        for k in range(SIZE):
            assert sketch.slack <= float(values[k:].sum()) / (SIZE - k) + room


@pytest.mark.parametrize("kind", ["full", "mean"])
@settings(deadline=None, max_examples=40)
@given(chunks=parts())
def test_a_part_comes_out_again_as_it_went_in(kind, chunks):
    whole = merge_statistics([over(p, kind) for p in chunks])
    rest = merge_statistics([over(p, kind) for p in chunks[1:]])
    assert_equal(whole - over(chunks[0], kind), rest)


@pytest.mark.parametrize("kind", ["rows", "sketch"])
def test_what_cannot_be_taken_apart_exactly_is_refused(kind):
    a = over(torch.randn(5, DIM), kind)
    with pytest.raises(StatisticsError, match="cannot be taken apart exactly"):
        (a + a) - a


def test_more_than_there_is_cannot_be_taken_out():
    a, b = over(torch.randn(3, DIM), "full"), over(torch.randn(4, DIM), "full")
    with pytest.raises(StatisticsError, match="4 rows cannot be taken out of 3"):
        a - b
    with pytest.raises(StatisticsError, match="nothing to merge"):
        merge_statistics([])


@pytest.mark.parametrize("one", ["full", "rows", "sketch"])
@pytest.mark.parametrize("two", ["full", "rows", "sketch"])
def test_representations_mix(one, two):
    """A team may have been short of memory: its sketch still adds to a full moment."""
    x, y = torch.randn(9, DIM), torch.randn(4, DIM)
    mixed, whole = over(x, one) + over(y, two), over(torch.cat([x, y]), "full")
    for layer in ("a", "b"):
        left = torch.linalg.eigvalsh(matrix(whole, layer) - mixed.moment(layer).matrix)
        slack = mixed.moment(layer).slack
        assert float(left[0]) >= -1e-6
        assert slack is None or float(left[-1]) <= slack + 1e-6

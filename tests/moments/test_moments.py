"""Every representation of a second moment against the dense float64 matrix of the same rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import StatisticsError
from orthomerge.moments import MeanMoment, RowMoment, SecondMoment, SketchMoment, as_moment

DIM = 12
# Each kind with room for all rows of these tests, so that it must agree with the dense oracle.
EXACT = {
    "full": lambda d=DIM: SecondMoment(d),
    "rows": lambda d=DIM: RowMoment(d, 64),
    "sketch": lambda d=DIM: SketchMoment(d, 64),
    "mean": lambda d=DIM: MeanMoment(d),
}
KINDS = list(EXACT)
kinds = pytest.mark.parametrize("kind", KINDS)


def rows_of(n, d=DIM, seed=0, rank=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(1000 + seed)
    h = torch.randn(n, d, generator=g, dtype=torch.float64)
    if rank is not None:
        h = h[:, :rank] @ torch.randn(rank, d, generator=g, dtype=torch.float64)
    return h.to(dtype)


def dense(h, kind="full"):
    """The oracle."""
    h = h.double()
    if kind == "mean":
        h = h.mean(dim=0, keepdim=True)
    return h.T @ h / len(h)


def close(found, expected, tolerance=1e-12):
    assert torch.linalg.matrix_norm(found - expected) <= tolerance * (
        torch.linalg.matrix_norm(expected) + 1e-300
    )


# ------------------------------------------------------------------ agreement with the oracle


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_all_that_is_asked_of_a_moment_agrees_with_the_dense_matrix(kind, dtype, n):
    h = rows_of(n, dtype=dtype)
    moment, S = EXACT[kind]().update(h), dense(h, kind)
    A = rows_of(5, seed=7)
    assert moment.kind == kind
    assert moment.dim == DIM
    assert moment.count == (1 if kind == "mean" else n)
    close(moment.matrix, S)
    close(moment.apply(A.T), S @ A.T)
    close(moment.quadratic(A), A @ S @ A.T)
    close(moment.energies(A)[None], torch.diagonal(A @ S @ A.T)[None])
    assert moment.trace == pytest.approx(float(S.trace()), rel=1e-12)
    if moment.factor is not None:
        assert moment.factor.dtype == torch.float64
        close(moment.factor.T @ moment.factor, S)
    assert moment.matrix.dtype == torch.float64


@kinds
@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 1000))
def test_the_split_of_the_rows_makes_no_difference(kind, cuts, seed):
    h = rows_of(40, seed=seed)
    edges = [0, *sorted(cuts), 40]
    chunks, total = EXACT[kind](), None
    for a, b in itertools.pairwise(edges):
        assert chunks.update(h[a:b]) is chunks
        if b > a:
            part = EXACT[kind]().update(h[a:b])
            total = part if total is None else total + part
    close(chunks.matrix, dense(h, kind))
    close(total.matrix, dense(h, kind))
    assert chunks.count == total.count == (1 if kind == "mean" else 40)


@kinds
def test_sums_commute_and_associate(kind):
    parts = [rows_of(n, seed=n) for n in (3, 1, 9)]
    a, b, c = (EXACT[kind]().update(h) for h in parts)
    expected = dense(torch.cat(parts), kind)
    for total in ((a + b) + c, a + (b + c), c + (b + a), (b + c) + a):
        close(total.matrix, expected)
        assert total.dim == DIM
        assert total.trace == pytest.approx(float(expected.trace()))
    close(a.matrix, dense(parts[0], kind))  # summands stay as they were


@pytest.mark.parametrize(("one", "two"), itertools.permutations(["full", "rows", "sketch"], 2))
def test_kinds_mix_in_sums_whichever_comes_first(one, two):
    h, k = rows_of(7), rows_of(9, seed=1)
    total = EXACT[one]().update(h) + EXACT[two]().update(k)
    close(total.matrix, dense(torch.cat([h, k])))
    assert total.count == 16
    assert total.kind == ("full" if "full" in (one, two) else "sketch")


@pytest.mark.parametrize("kind", ["full", "rows", "sketch"])
def test_a_task_mean_adds_up_with_nothing_else(kind):
    mean, other = MeanMoment(DIM).update(rows_of(3)), EXACT[kind]().update(rows_of(4))
    for a, b in ((mean, other), (other, mean)):
        with pytest.raises(StatisticsError, match="one --granularity"):
            a + b


@pytest.mark.parametrize(
    ("kind", "other"),
    [*itertools.product(["full", "rows", "sketch"], repeat=2), ("mean", "mean")],
)
def test_adding_nothing_changes_nothing(kind, other):
    h = rows_of(6)
    moment = EXACT[kind]().update(h)
    for total in (moment + EXACT[other](), EXACT[other]() + moment):
        close(total.matrix, dense(h, kind))
        assert total.count == moment.count
    close(EXACT[kind]().update(h[:0]).update(h).update(h[:0]).matrix, dense(h, kind))


@kinds
def test_a_moment_goes_on_after_it_was_asked_merged_and_restored(kind):
    h = rows_of(30)
    moment = EXACT[kind]().update(h[:10])
    moment.matrix, moment.factor, moment.trace  # noqa: B018  (whatever is cached must not stay)
    moment.update(h[10:14])
    moment = moment + EXACT[kind]().update(h[14:20])
    moment.update(h[20:24])
    moment = type(moment).restore(*moment.state())
    moment.update(h[24:])
    if kind == "rows":
        close(moment.gram, moment.factor @ moment.factor.T)
    close(moment.matrix, dense(h, kind))


@pytest.mark.parametrize("kind", ["full", "mean"])
def test_what_was_added_can_be_taken_out(kind):
    h, k = rows_of(20), rows_of(9, seed=3)
    whole = EXACT[kind]().update(torch.cat([h, k]))
    left = whole - EXACT[kind]().update(k)
    close(left.matrix, dense(h, kind), 1e-11)
    close((left + EXACT[kind]().update(k)).matrix, whole.matrix, 1e-11)
    for much in (whole, whole + left):
        with pytest.raises(StatisticsError, match="part"):
            whole - much


def test_what_cannot_be_taken_apart_is_refused():
    h = rows_of(9)
    for kind in ("rows", "sketch"):
        with pytest.raises(StatisticsError, match=f"'{kind}' cannot be taken apart"):
            EXACT[kind]().update(h) - EXACT[kind]().update(h[:2])
    full = SecondMoment(DIM).update(h)
    with pytest.raises(StatisticsError, match="cannot be taken apart"):
        full - RowMoment.from_rows(h[:2])
    mixed = full + SketchMoment(DIM, 2).update(h)
    with pytest.raises(StatisticsError, match="sketches or samples"):
        mixed - full


def test_a_difference_without_energy_in_a_feature_can_still_be_kept():
    """Rounding leaves a tiny negative diagonal there, which a file must not be refused for."""
    h, k = rows_of(40), rows_of(500, seed=5) * 1e3
    h[:, :6] = 0.0
    once, chunks = SecondMoment(DIM).update(k), SecondMoment(DIM)
    for chunk in k.split(1):
        chunks.update(chunk)
    rounding = torch.diagonal(once.matrix - chunks.matrix)[:6]
    assert float(rounding.min()) < 0 or float(rounding.max()) > 0
    for whole, part in ((once, chunks), (chunks, once)):
        left = (whole + SecondMoment(DIM).update(h)) - part
        assert float(left.matrix[:6, :6].abs().max()) < 1e-6
        close(SecondMoment.restore(*left.state()).matrix, left.matrix)


# ------------------------------------------------------------------ what is refused


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_that_are_not_finite_are_counted_refused_and_leave_no_trace(kind, bad, dtype):
    h = rows_of(9, dtype=dtype)
    broken = h.clone()
    broken[2, 5] = broken[7, 0] = broken[7, 1] = bad
    broken[7, 2] = -bad
    moment = EXACT[kind]().update(h)
    with pytest.raises(StatisticsError, match="2 of 9 feature rows hold NaN or infinity"):
        moment.update(broken)
    moment.update(h)
    close(moment.matrix, dense(h, kind))


@kinds
def test_large_finite_rows_are_no_infinity(kind):
    h = torch.full((3, DIM), 3e38)
    close(EXACT[kind]().update(h).matrix, dense(h, kind))
    h = torch.full((3, DIM), 6e4, dtype=torch.float16)
    close(EXACT[kind]().update(h).matrix, dense(h, kind))


@kinds
def test_rows_or_moments_of_another_width_are_refused(kind):
    moment = EXACT[kind]().update(rows_of(3))
    with pytest.raises(StatisticsError, match=f"width {DIM}"):
        moment.update(rows_of(3, DIM + 1))
    with pytest.raises(StatisticsError, match=r"12 and 13|13 and 12"):
        moment + EXACT[kind](13).update(rows_of(3, 13))
    with pytest.raises(StatisticsError, match="empty or all padding"):
        EXACT[kind]().matrix  # noqa: B018
    if kind in ("full", "mean"):
        with pytest.raises(StatisticsError, match="do not add up"):
            moment - EXACT[kind](13).update(rows_of(1, 13))


def test_a_bound_below_one_is_refused():
    for make in (RowMoment, SketchMoment):
        with pytest.raises(StatisticsError, match="at least one"):
            make(DIM, 0)


def test_only_a_square_tensor_is_a_moment():
    S = dense(rows_of(5))
    assert as_moment(S).matrix is S
    with pytest.raises(StatisticsError, match="from_rows"):
        as_moment(torch.zeros(3, 4, dtype=torch.float64))


# ------------------------------------------------------------------ state and restore


def one_of_each():
    h, k = rows_of(30), rows_of(9, seed=2)
    sampled = RowMoment(DIM, 6).update(h)
    sketch = SketchMoment(DIM, 4).update(h)
    return {
        "full": SecondMoment(DIM).update(h),
        "full with a sketch": SecondMoment(DIM).update(h) + sketch,
        "full with a sample": SecondMoment(DIM).update(h) + sampled,
        "rows": RowMoment.from_rows(k),
        "more rows than wide": RowMoment.from_rows(h),
        "one row": RowMoment.from_rows(h[:1]),
        "zero rows": RowMoment.from_rows(torch.zeros(3, DIM)),
        "sampled": sampled,
        "sampled and merged": sampled + RowMoment.from_rows(k),
        "sketch": sketch,
        "sketch with nothing lost": SketchMoment(DIM, 20).update(k),
        "sketch with a sample": sketch + sampled,
        "mean": MeanMoment(DIM).update(h),
    }


@pytest.mark.parametrize("name", list(one_of_each()))
def test_a_state_brings_the_moment_back(name):
    moment = one_of_each()[name]
    again = type(moment).restore(*moment.state())
    close(again.matrix, moment.matrix)
    assert again.count == moment.count
    assert again.exact == moment.exact
    assert (again.slack is None) == (moment.slack is None)
    assert (again.slack or 0.0) == pytest.approx(moment.slack or 0.0, rel=1e-12)
    if isinstance(moment, MeanMoment):
        assert again.tokens == moment.tokens
    twice = type(moment).restore(*again.state())
    close(twice.matrix, moment.matrix)
    for moved in (moment.to("cpu"), moment.to(torch.device("cpu"))):
        assert moved is moment  # which is there already


BAD = torch.tensor(math.nan)
IMPOSSIBLE = [
    ("full", {"matrix": lambda m: m[:, :-1]}, {}),
    ("full", {"matrix": lambda m: m[0]}, {}),
    ("full", {"matrix": lambda m: -m}, {}),
    ("full", {"matrix": lambda m: m * BAD}, {}),
    ("full", {}, {"count": 0}),
    ("full", {}, {"count": -4}),
    ("full with a sketch", {}, {"slack": -1.0}),
    ("rows", {"factor": lambda m: m[0]}, {}),
    ("rows", {"factor": lambda m: m * BAD}, {}),
    ("rows", {"factor": lambda m: m / 0.0}, {}),
    ("rows", {}, {"count": 0}),
    ("rows", {}, {"slack": -1e-3}),
    ("rows", {}, {"slack": math.nan}),
    ("rows", {}, {"limit": 0}),
    ("sketch", {}, {"size": 3}),
    ("sketch", {}, {"size": 0}),
    ("sketch", {}, {"count": 0}),
    ("sketch", {}, {"slack": -1.0}),
    ("sketch", {}, {"slack": math.inf}),
    ("sketch", {"factor": lambda m: m * BAD}, {}),
    ("mean", {"mean": lambda m: m[None]}, {}),
    ("mean", {"mean": lambda m: m * BAD}, {}),
    ("mean", {}, {"tokens": 0}),
]


@pytest.mark.parametrize(("name", "change", "values"), IMPOSSIBLE)
def test_a_state_that_no_moment_has_is_refused(name, change, values):
    moment = one_of_each()[name]
    tensors, fields = moment.state()
    tensors = {k: change.get(k, lambda t: t)(t) for k, t in tensors.items()}
    with pytest.raises(StatisticsError):
        type(moment).restore(tensors, {**fields, **values})


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("n", [2, 7, 30])
def test_no_saved_row_is_a_row_that_was_seen(n):
    h = rows_of(n)
    saved = RowMoment.from_rows(h).state()[0]["factor"]
    assert saved.shape == (min(n, DIM), DIM)
    assert torch.equal(saved, torch.triu(saved))
    close(saved.T @ saved, dense(h))
    seen = torch.nn.functional.normalize(h) @ torch.nn.functional.normalize(saved).T
    assert float(seen.abs().max()) < 0.999


def test_what_is_saved_depends_on_the_moment_and_not_on_the_rows():
    """Of rows with one and the same moment none can be told from the file."""
    h = rows_of(7)
    turn, _ = torch.linalg.qr(rows_of(7, 7, seed=4))
    one, two = (RowMoment.from_rows(x).state()[0]["factor"] for x in (h, turn @ h))
    close(one, two, 1e-10)


def test_merged_rows_stay_as_few_as_there_are_dimensions():
    total = RowMoment.from_rows(rows_of(5))
    for seed in range(1, 9):
        total = total + RowMoment.from_rows(rows_of(5, seed=seed))
    assert total.kept <= DIM
    assert total.exact
    close(total.matrix, dense(torch.cat([rows_of(5, seed=s) for s in range(9)])))


def test_up_to_the_limit_every_row_is_kept_and_beyond_it_the_moment_says_so():
    h = rows_of(20)
    just, beyond = RowMoment(DIM, 20).update(h), RowMoment(DIM, 19).update(h)
    assert just.exact
    assert just.slack == 0.0
    assert just.kept == 20
    assert not beyond.exact
    assert beyond.slack is None
    assert beyond.kept == 19
    assert just.count == beyond.count == 20


def kept_rows(moment, n):
    """Which of `n` rows, each its own unit vector, a sample holds."""
    return (torch.diagonal(moment.matrix) > 0)[:n]


def test_a_sample_is_uniform_and_unbiased():
    """Each of 40 rows stays with probability 10/40, wherever in the stream it came."""
    n, limit, runs = 40, 10, 400
    h = torch.eye(n)
    hits, total = torch.zeros(n), torch.zeros(n, n, dtype=torch.float64)
    for run in range(runs):
        moment = RowMoment(n, limit)
        for chunk, part in enumerate(h.split(7)):
            moment.update(part, draw=1000 * run + chunk)
        hits += kept_rows(moment, n)
        total += moment.matrix
    # Binomial(400, 1/4): mean 100, deviation 8.7; five deviations for forty rows.
    assert float(hits.min()) > 100 - 5 * 8.7
    assert float(hits.max()) < 100 + 5 * 8.7
    assert float(hits.sum()) == runs * limit
    # Against pairs that would always stay or go together: 400 · (10·9)/(40·39) = 23 expected.
    chi = float(((hits - 100).square() / (100 * 0.75)).sum())
    assert chi < 40 + 5 * math.sqrt(80)
    close(total / runs, torch.eye(n, dtype=torch.float64) / n, 0.15)


def test_without_a_draw_the_pieces_are_sampled_uniformly_as_well():
    n, limit = 4000, 1000
    place = torch.arange(n, dtype=torch.float64)[:, None] + 1
    moment = RowMoment(1, limit)
    for chunk in place.split(10):
        moment.update(chunk)
    kept = moment.factor[:, 0] * math.sqrt(limit)  # the scale n / limit and the count n undone
    quarters = torch.histc(kept, 4, 0, n)
    # Hypergeometric: 250 of each quarter expected, deviation 11.9.
    assert float(quarters.sum()) == limit
    assert float((quarters - 250).abs().max()) < 5 * 11.9


def test_a_sample_depends_on_the_draws_and_not_on_the_order_of_the_pieces():
    chunks = [rows_of(9, seed=s) for s in range(5)]
    found = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        moment = RowMoment(DIM, 8)
        for i in order:
            moment.update(chunks[i], draw=i)
        found.append(moment.matrix)
    close(found[0], found[1])


def test_merged_samples_weigh_by_the_rows_seen():
    h, k = torch.ones(90, DIM, dtype=torch.float64), -2 * torch.ones(10, DIM, dtype=torch.float64)
    total = RowMoment(DIM, 4).update(h) + RowMoment(DIM, 20).update(k)
    close(total.matrix, dense(torch.cat([h, k])))
    assert total.count == 100
    assert not total.exact
    assert total.slack is None


def test_rows_of_two_types_are_not_rounded_to_the_narrower():
    h, k = rows_of(4), rows_of(4, seed=1, dtype=torch.bfloat16)
    moment = RowMoment(DIM).update(h).update(k)
    close(moment.matrix, dense(torch.cat([h, k.double()])))


def test_a_factor_is_its_own_copy():
    h = rows_of(5)
    moment, before = RowMoment.from_rows(h), dense(h)
    h.zero_()
    moment.factor.zero_()
    close(moment.matrix, before)


# ------------------------------------------------------------------ sketches


@st.composite
def streams(draw):
    """Rows of all sorts: decaying, flat, of low rank, repeated, of unlike lengths, zero."""
    d, n = draw(st.integers(2, 16)), draw(st.integers(1, 60))
    h = rows_of(n, d, seed=draw(st.integers(0, 10_000)))
    sort = draw(st.sampled_from(["flat", "decay", "low rank", "repeated", "scaled", "zeros"]))
    if sort == "decay":
        h = h * 0.5 ** torch.arange(d, dtype=torch.float64)
    elif sort == "low rank":
        h = rows_of(n, d, seed=n, rank=draw(st.integers(1, d)))
    elif sort == "repeated":
        h = h[torch.arange(n) % draw(st.integers(1, 4))]
    elif sort == "scaled":
        h = h * 10.0 ** (torch.arange(n, dtype=torch.float64)[:, None] % 9 - 4)
    elif sort == "zeros":
        h = h * (torch.arange(n)[:, None] % 3 == 0)
    return h


def assert_bound(S, sketch, size):
    """`0 ≤ xᵀ(S − Ŝ)x ≤ slack ≤ (tr S − Σ_{i≤k} λ_i) / (size − k)` for every k < size."""
    rounding = 1e-12 * float(S.trace()) + 1e-300
    gap = torch.linalg.eigvalsh(S - sketch.matrix)
    assert float(gap[0]) >= -rounding
    assert float(gap[-1]) <= sketch.slack + rounding
    values = torch.linalg.eigvalsh(S).flip(0).clamp_min(0.0)
    for k in range(min(size, len(values) + 1)):
        assert sketch.slack <= float(values[k:].sum()) / (size - k) + rounding


@settings(deadline=None, max_examples=80)
@given(h=streams(), size=st.integers(1, 12), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_a_sketch_keeps_its_bound(h, size, cuts):
    sketch = SketchMoment(h.shape[1], size)
    for a, b in itertools.pairwise([0, *sorted(min(c, len(h)) for c in cuts), len(h)]):
        sketch.update(h[a:b])
        if b and a % 2:
            sketch.factor  # noqa: B018  (asking in between shrinks early)
    assert sketch.factor.shape[0] <= size
    assert_bound(dense(h), sketch, size)


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(st.integers(1, 25), min_size=2, max_size=9), seed=st.integers(0, 999))
def test_merged_sketches_keep_the_bound(parts, seed):
    size, chunks = 4, [rows_of(n, seed=seed + i, rank=9) for i, n in enumerate(parts)]
    total = SketchMoment(DIM, size)
    for chunk in chunks:
        total = total + SketchMoment(DIM, size).update(chunk)
    h = torch.cat(chunks)
    assert total.count == len(h)
    assert_bound(dense(h), total, size)
    halves = [
        sum((SketchMoment(DIM, size).update(p) for p in half), SketchMoment(DIM, size))
        for half in (chunks[::2], chunks[1::2])
    ]
    assert_bound(dense(h), halves[0] + halves[1], size)


def test_sketches_of_two_sizes_keep_the_bound_of_the_smaller():
    h, k = rows_of(40), rows_of(40, seed=1)
    total = SketchMoment(DIM, 3).update(h) + SketchMoment(DIM, 9).update(k)
    assert total.size == 9
    assert_bound(dense(torch.cat([h, k])), total, 3)


def test_a_sketch_of_few_directions_loses_nothing():
    h = rows_of(200, rank=4)
    sketch = SketchMoment(DIM, 5).update(h)
    close(sketch.matrix, dense(h), 1e-12)
    assert sketch.slack <= 1e-12 * float(dense(h).trace())


def test_a_sketch_says_what_it_lost():
    h = rows_of(60)
    sketch = SketchMoment(DIM, 4).update(h)
    assert not sketch.exact
    gap = torch.linalg.eigvalsh(dense(h) - sketch.matrix)
    assert 0.5 * sketch.slack <= float(gap[-1]) <= sketch.slack  # tight, for flat rows


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_is_as_honest_as_its_parts(order):
    h, k = rows_of(40), rows_of(20, seed=1)
    S = dense(torch.cat([h, k]))
    lossy, sampled = SketchMoment(DIM, 4).update(h), RowMoment(DIM, 5).update(h)
    for exact in (SecondMoment(DIM), RowMoment(DIM), SketchMoment(DIM, 64)):
        a, b = (lossy, exact.update(k))[::order]
        total = a + b
        assert not total.exact
        gap = torch.linalg.eigvalsh(S - total.matrix)
        assert float(gap[0]) >= -1e-12
        assert float(gap[-1]) <= total.slack + 1e-12
        a, b = (sampled, exact)[::order]
        assert not (a + b).exact
        assert (a + b).slack is None
    both = sampled + lossy
    assert both.slack is None
    assert type(both).restore(*both.state()).slack is None
    # More rows of its own dilute what a full moment lacks.
    full = SecondMoment(DIM).update(k) + lossy
    assert full.update(k).slack == pytest.approx(lossy.slack * 40 / 80)

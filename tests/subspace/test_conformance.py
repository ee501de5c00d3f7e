"""One table: every solver, every representation of the statistics, and what must not matter."""

from __future__ import annotations

import itertools

import pytest
import torch

from orthomerge.errors import OrthomergeError, SubspaceError
from orthomerge.moments import (
    Moment,
    RowMoment,
    SecondMoment,
    SketchMoment,
    combine,
)
from orthomerge.subspace import Subspace, get_solver, list_solvers

D, RANK = 40, 4

SOLVERS = {
    "min_eigen": {},
    "min_eigen, floor": {"floor": 0.3},
    "null_space, own": {"tie": "own"},
    "null_space, random": {"tie": "random"},
    "contrastive": {},
    "contrastive, silent": {"balance": 1e-6},
    "contrastive, loud": {"balance": 10.0},
    "joint": {},
    "random_orthonormal": {},
    "null_space_lapack": {},
}
# Chosen by the energies alone: where they are not degenerate the span is unique.
BY_ENERGY = [n for n in SOLVERS if n.split(",")[0] in ("contrastive", "joint")] + [
    "null_space, own",
    "min_eigen, floor",
]
FORMS = {
    "full": lambda h: SecondMoment(D).update(h),
    "rows": lambda h: RowMoment.from_rows(h),
    "restored rows": lambda h: RowMoment.restore(*RowMoment.from_rows(h).state()),
    "sketch": lambda h: SketchMoment(D, 36).update(h),
}


def rows_of(n, seed, d=D):
    g = torch.Generator().manual_seed(7000 + seed)
    scale = 0.9 ** torch.arange(d, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * scale) @ turn


def solve(name, other, own, rank=RANK, **changes) -> Subspace:
    return get_solver(name.split(",")[0])(other, rank, own=own, **SOLVERS[name], **changes)


def span(found):
    return found.basis.T @ found.basis


def assert_same_energies(one, two, relative=1e-6):
    for a, b, total in (
        (one.captured_other, two.captured_other, one.total_other),
        (one.captured_own, two.captured_own, one.total_own),
    ):
        assert a == pytest.approx(b, rel=relative, abs=1e-11 * total)


def assert_solution(found, other, own, rank):
    """What every solution is, whatever it was asked for."""
    eye = torch.eye(rank, dtype=torch.float64)
    assert found.basis.shape == (rank, other.dim)
    assert found.basis.dtype == torch.float64
    assert torch.linalg.matrix_norm(found.basis @ found.basis.T - eye) <= 1e-10
    energies = torch.diagonal(found.basis @ other.matrix @ found.basis.T)
    close = {"rel": 1e-9, "abs": 1e-12 * other.trace}
    assert found.captured_other == pytest.approx(float(energies.sum()), **close)
    assert found.eigenvalues.tolist() == pytest.approx(energies.tolist(), **close)
    mine = float(torch.trace(found.basis @ own.matrix @ found.basis.T))
    assert found.captured_own == pytest.approx(mine, rel=1e-9, abs=1e-12 * own.trace)
    assert found.total_other == pytest.approx(other.trace)
    assert found.total_own == pytest.approx(own.trace)
    assert rank <= found.admissible <= other.dim
    assert found.cost.seconds >= 0
    assert found.cost.how


def test_the_table_names_every_solver():
    assert {n.split(",")[0] for n in SOLVERS} == {s.name for s in list_solvers()}


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("others", list(FORMS))
@pytest.mark.parametrize("owns", list(FORMS))
def test_the_representation_makes_no_difference(name, others, owns):
    h, k = rows_of(12, 1), rows_of(9, 2)
    other, own = FORMS[others](h), FORMS[owns](k)
    found = solve(name, other, own)
    assert_solution(found, other, own, RANK)
    dense = solve(name, FORMS["full"](h), FORMS["full"](k))
    if name == "null_space_lapack":  # whatever the library returns: only the silence is fixed
        assert found.captured_other <= 1e-12 * other.trace
        return
    assert_same_energies(found, dense)
    torch.testing.assert_close(span(found), span(dense), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n in SOLVERS if not n.startswith("null_space")])
@pytest.mark.parametrize("n", [38, 39, 60])
def test_rows_without_room_beside_them_are_solved_as_the_matrix_is(name, n):
    h, k = rows_of(n, 1), rows_of(n, 2)
    one = solve(name, RowMoment.from_rows(h), RowMoment.from_rows(k))
    assert_same_energies(one, solve(name, FORMS["full"](h), FORMS["full"](k)))


@pytest.mark.parametrize("n", [12, 60])
@pytest.mark.parametrize("form", ["full", "rows"])
def test_min_eigen_captures_what_eigh_says_is_least(form, n):
    other = FORMS[form](rows_of(n, 3))
    for rank in (1, 4, 28, 29, 40):
        found = solve("min_eigen", other, None, rank)
        least = torch.linalg.eigvalsh(other.matrix)[:rank].sum()
        assert found.captured_other == pytest.approx(
            float(least), rel=1e-6, abs=1e-11 * other.trace
        )


@pytest.mark.parametrize("form", ["full", "rows", "sketch"])
@pytest.mark.parametrize("name", BY_ENERGY)
def test_solutions_turn_with_the_features(name, form):
    turn, _ = torch.linalg.qr(rows_of(D, 5))
    h, k = rows_of(12, 1), rows_of(9, 2)
    plain = solve(name, FORMS[form](h), FORMS[form](k))
    turned = solve(name, FORMS[form](h @ turn), FORMS[form](k @ turn))
    torch.testing.assert_close(span(turned), turn.T @ span(plain) @ turn, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["full", "rows", "sketch"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "null_space_lapack"])
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_unit_of_the_features_does_not_matter(name, form, scale):
    h, k = rows_of(12, 1), rows_of(9, 2)
    plain = solve(name, FORMS[form](h), FORMS[form](k))
    scaled = solve(name, FORMS[form](h * scale), FORMS[form](k * scale))
    torch.testing.assert_close(span(scaled), span(plain), atol=1e-6, rtol=0)
    assert scaled.captured_own == pytest.approx(plain.captured_own * scale**2, rel=1e-6)


@pytest.mark.parametrize("form", ["full", "rows"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "null_space_lapack"])
def test_neither_order_nor_batches_of_the_others_matter(name, form):
    parts = [rows_of(4, seed) for seed in range(10, 13)]
    own = FORMS[form](rows_of(9, 2))
    spans = []
    for order in itertools.permutations(range(3)):
        spans.append(span(solve(name, combine([FORMS[form](parts[i]) for i in order]), own)))
    whole = FORMS[form](torch.cat(parts))
    chunks = FORMS[form](torch.cat(parts)[:1])
    for row in torch.cat(parts)[1:].split(3):
        chunks.update(row) if form == "full" else None
        chunks = chunks if form == "full" else chunks + FORMS[form](row)
    spans += [span(solve(name, whole, own)), span(solve(name, chunks, own))]
    for other in spans[1:]:
        torch.testing.assert_close(other, spans[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["full", "rows"])
@pytest.mark.parametrize("name", ["min_eigen", "null_space, random"])
def test_tasks_and_seeds_get_rows_of_their_own_in_a_null_space(name, form):
    """A random pair of 4-dimensional subspaces of 200 dimensions has a mean cosine near 0.1."""
    tasks = [rows_of(6, 20 + t, 200) for t in range(4)]
    forms = {"full": lambda h: SecondMoment(200).update(h), "rows": RowMoment.from_rows}
    bases = []
    for t in range(4):
        others = combine([forms[form](h) for u, h in enumerate(tasks) if u != t])
        bases.append(solve(name, others, None, seed=t).basis)
    others = combine([forms[form](h) for h in tasks[1:]])
    bases.append(solve(name, others, None, seed=11).basis)
    for a, b in itertools.combinations(bases, 2):
        assert float(torch.linalg.svdvals(a @ b.T).mean()) < 0.3


@pytest.mark.parametrize("form", ["full", "rows", "sketch"])
def test_a_direction_that_no_task_uses_is_not_chosen_while_own_energy_is_inside_the_floor(form):
    """Features live in 20 of 40 dimensions; the own task is there, where the others are quiet."""
    used = 20
    others, own = torch.zeros(30, D).double(), torch.zeros(12, D).double()
    others[:, :used] = rows_of(30, 1, used)
    others[:, used - 6 : used] *= 1e-2
    own[:, used - 6 : used] = rows_of(12, 2, 6)
    other, mine = FORMS[form](others), FORMS[form](own)
    found = solve("min_eigen, floor", other, mine)
    assert found.captured_own > 0.5 * mine.trace
    assert float(found.basis[:, used:].norm()) < 1e-6
    assert found.captured_other <= 0.3 * RANK * other.trace / D
    plain = solve("min_eigen", other, mine)
    assert plain.captured_own < 1e-6 * mine.trace  # the mistake the floor is there for


# ------------------------------------------------------------------ the edges


def zeros(n=3):
    return torch.zeros(n, D, dtype=torch.float64)


EDGES = {
    "own is the others": lambda: (rows_of(9, 1), rows_of(9, 1)),
    "own is one row": lambda: (rows_of(9, 1), rows_of(1, 2)),
    "own is of rank two": lambda: (rows_of(9, 1), rows_of(9, 3) @ rows_of(2, 5).T @ rows_of(2, 4)),
    "others are one row": lambda: (rows_of(1, 1), rows_of(9, 2)),
    "own repeats rows": lambda: (rows_of(9, 1), rows_of(3, 2).repeat(5, 1)),
    "own is silent": lambda: (rows_of(9, 1), zeros()),
    "others are silent": lambda: (zeros(), rows_of(9, 2)),
    "all is silent": lambda: (zeros(), zeros()),
    "own is all of the others and more": lambda: (
        rows_of(9, 1),
        torch.cat([rows_of(9, 1), rows_of(9, 6)]),
    ),
}


@pytest.mark.parametrize("edge", list(EDGES))
@pytest.mark.parametrize("name", list(SOLVERS))
def test_at_the_edges_solutions_are_sound_and_alike_in_every_form(edge, name):
    h, k = EDGES[edge]()
    spans = []
    for others, owns in itertools.product(["full", "rows", "sketch"], repeat=2):
        other, own = FORMS[others](h), FORMS[owns](k)
        found = solve(name, other, own)
        assert_solution(found, other, own, RANK)
        if name.startswith(("null_space", "min_eigen")) and "floor" not in name:
            assert found.captured_other <= 1e-12 * other.trace
        spans.append(span(found))
    # All quotients within 1e-13 of one another: the span is not a function of the moments then.
    flat = edge == "own is the others" and name == "contrastive, silent"
    if name != "null_space_lapack" and not flat:
        for other_span in spans[1:]:
            torch.testing.assert_close(other_span, spans[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("forms", itertools.product(["full", "rows"], repeat=2))
@pytest.mark.parametrize("name", ["contrastive", "joint"])
def test_where_own_features_are_few_the_rest_is_silent_on_the_others(name, forms):
    """Directions without own energy are arbitrary: they must not be loud, and follow the seed."""
    other, own = FORMS[forms[0]](rows_of(9, 1)), FORMS[forms[1]](rows_of(2, 2))
    found = solve(name, other, own)
    assert found.captured_other <= 0.05 * other.trace / D * RANK
    again, another = solve(name, other, own), solve(name, other, own, seed=1)
    assert torch.equal(again.basis, found.basis)
    assert float(torch.linalg.svdvals(found.basis @ another.basis.T)[-1]) < 0.9
    assert another.captured_own == pytest.approx(found.captured_own, rel=1e-2)


@pytest.mark.parametrize("form", ["full", "rows"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if not n.startswith("null_space")])
def test_all_dimensions_can_be_asked_for(name, form):
    other, own = FORMS[form](rows_of(60, 1)), FORMS[form](rows_of(60, 2))
    found = solve(name, other, own, D)
    assert_solution(found, other, own, D)
    assert found.captured_other == pytest.approx(other.trace)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_said_in_one_sentence(name, bad):
    good, broken = FORMS["full"](rows_of(9, 1)), rows_of(D, 1)
    broken[3, 5] = bad
    forms: list[Moment] = [
        SecondMoment.from_matrix(broken, 9),
        RowMoment.from_factor(broken[:9], 9),
    ]
    for moment in forms:
        with pytest.raises(SubspaceError, match="the others' second moment holds NaN") as said:
            solve(name, moment, good)
        assert str(said.value).count(". ") == 0
        with pytest.raises(SubspaceError, match="the own second moment holds NaN"):
            solve(name, good, moment)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("form", list(FORMS))
def test_a_rank_that_does_not_fit_and_no_rows_at_all_are_said(name, form):
    other, own = FORMS[form](rows_of(9, 1)), FORMS[form](rows_of(9, 2))
    for rank in (0, -1, D + 1):
        with pytest.raises(SubspaceError, match=f"choose a rank from 1 to {D}"):
            solve(name, other, own, rank)
    with pytest.raises(OrthomergeError, match="no feature row was seen"):
        solve(name, type(other)(D), own)


def test_null_space_says_how_much_room_there_is():
    for form in FORMS:
        other = FORMS[form](rows_of(9, 1))
        assert solve("null_space, random", other, None, 31).admissible == 31
        with pytest.raises(SubspaceError, match="leave 31 of 40 dimensions free"):
            solve("null_space, random", other, None, 32)


def test_sketches_and_samples_hand_on_what_they_do_not_know():
    own = FORMS["rows"](rows_of(9, 2))
    lossy = SketchMoment(D, 4).update(rows_of(60, 1))
    for name in ("min_eigen", "contrastive", "joint"):
        found = solve(name, lossy, own)
        assert found.slack == lossy.slack > 0
        truth = FORMS["full"](rows_of(60, 1)).energies(found.basis)
        assert bool((truth <= found.eigenvalues + found.slack * (1 + 1e-9)).all())
        assert solve(name, RowMoment(D, 5).update(rows_of(60, 1)), own).slack is None
        assert solve(name, own, own).slack == 0.0

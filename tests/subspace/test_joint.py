"""`joint`: away from the others' features and from the rows that other adapters hold."""

from __future__ import annotations

import itertools

import pytest
import torch

from orthomerge.errors import OrthomergeError, SubspaceError
from orthomerge.moments import RowMoment, SecondMoment, leave_one_out
from orthomerge.subspace import avoid_rows, get_solver, orthonormal_rows, solve_jointly

D, RANK = 64, 4
FORMS = {"full": lambda h: SecondMoment(h.shape[1]).update(h), "rows": RowMoment.from_rows}
forms = pytest.mark.parametrize("form", list(FORMS))


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(9000 + seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def rows_of(seed, n=10, d=D):
    """Features that decay, in axes that the tasks share in part."""
    scale = 0.93 ** torch.arange(d, dtype=torch.float64)
    common, turn = (torch.linalg.qr(normal(d, d, seed=s)).Q for s in (999, 100 + seed))
    shared = (normal(n, d, seed=200 + seed) * scale) @ common
    return shared + (normal(n, d, seed=300 + seed) * scale) @ turn


def tasks(form, count=5, **shape):
    return [FORMS[form](rows_of(t, **shape)) for t in range(count)]


def overlap_of(a, b):
    return float((a @ b.T).square().sum())


@forms
def test_without_taken_rows_it_is_contrastive(form):
    own, *rest = tasks(form, 3)
    other = leave_one_out([own, *rest])[0]
    expected = get_solver("contrastive")(other, RANK, own=own)
    for taken in (None, torch.zeros(0, D).double(), torch.zeros(3, D).double()):
        found = get_solver("joint")(other, RANK, own=own, taken=taken)
        torch.testing.assert_close(found.basis, expected.basis, atol=1e-9, rtol=0)
    found = get_solver("joint")(other, RANK, own=own, taken=normal(3, D), overlap=0.0)
    torch.testing.assert_close(
        found.basis.T @ found.basis, expected.basis.T @ expected.basis, atol=1e-8, rtol=0
    )


@forms
def test_overlap_falls_as_it_is_asked_to_and_the_features_stay_avoided(form):
    moments = tasks(form)
    other, own = leave_one_out(moments)[0], moments[0]
    others = leave_one_out(moments)
    held = [get_solver("contrastive")(others[t], RANK, own=moments[t]).basis for t in range(1, 5)]
    taken = torch.cat(held)
    plain = get_solver("contrastive")(other, RANK, own=own)
    found = [
        get_solver("joint")(other, RANK, own=own, taken=taken, overlap=o)
        for o in (0.0, 0.1, 1.0, 10.0, 1e3, 1e6)
    ]
    overlaps = [overlap_of(f.basis, taken) for f in found]
    assert all(b < a for a, b in itertools.pairwise(overlaps))
    assert overlaps[0] == pytest.approx(overlap_of(plain.basis, taken))
    assert overlaps[3] < 1e-2 * overlaps[0]
    assert overlaps[-1] < 1e-9
    # However much it is asked to avoid the rows, the features still count.
    assert all(f.captured_other < 0.1 * RANK * other.trace / D for f in found)


@forms
@pytest.mark.parametrize("balance", [1e-3, 1e-2, 1.0])
def test_at_a_large_overlap_it_is_contrastive_outside_the_taken_rows(form, balance):
    moments = tasks(form)
    other, own = leave_one_out(moments)[0], moments[0]
    taken = orthonormal_rows(normal(20, D, seed=5))
    found = get_solver("joint")(other, RANK, own=own, taken=taken, balance=balance, overlap=1e7)
    # The oracle: the same generalised eigenproblem, posed in the complement.
    free = torch.linalg.qr(taken.T, mode="complete").Q[:, 20:]
    ridge = balance * other.trace / D * torch.eye(D - 20, dtype=torch.float64)
    root = torch.linalg.cholesky(free.T @ other.matrix @ free + ridge)
    inner = torch.linalg.solve_triangular(root, free.T @ own.matrix @ free, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
    top = torch.linalg.eigh(inner).eigenvectors[:, -RANK:]
    basis = orthonormal_rows((free @ torch.linalg.solve_triangular(root.T, top, upper=True)).T)
    assert found.captured_own == pytest.approx(float(own.energies(basis).sum()), rel=1e-4)
    assert found.captured_other == pytest.approx(float(other.energies(basis).sum()), rel=1e-4)


@forms
def test_the_length_of_the_taken_rows_does_not_matter(form):
    own, *rest = tasks(form, 3)
    other, taken = leave_one_out([own, *rest])[0], normal(6, D, seed=1)
    stretched = taken * torch.tensor([[1e-3], [1.0], [50.0], [7.0], [0.1], [2.0]]).double()
    one, two = (
        get_solver("joint")(other, RANK, own=own, taken=t) for t in (taken, stretched.float())
    )
    torch.testing.assert_close(one.basis.T @ one.basis, two.basis.T @ two.basis, atol=1e-5, rtol=0)


def test_rows_are_avoided_where_the_others_have_no_energy():
    own = FORMS["rows"](rows_of(0))
    silent = RowMoment.from_rows(torch.zeros(3, D).double())
    free = get_solver("joint")(silent, RANK, own=own)
    found = get_solver("joint")(silent, RANK, own=own, taken=free.basis)
    assert overlap_of(found.basis, free.basis) < 1e-2
    assert found.captured_own > 0.1 * free.captured_own


@forms
def test_what_is_avoided_is_the_moment_and_the_rows(form):
    other, taken = tasks(form, 1)[0], normal(6, D, seed=1)
    unit = taken / taken.norm(dim=1, keepdim=True)
    expected = other.matrix + 3.0 * other.trace / D * unit.T @ unit
    avoided = avoid_rows(other, taken, 3.0)
    assert avoided.kind == form
    torch.testing.assert_close(avoided.matrix, expected)
    many = avoid_rows(other, normal(D, D), 3.0)  # no room for a factor any more
    assert many.kind == "full"


@forms
@pytest.mark.parametrize("n", [10, 300])  # with room that the others do not reach, and without
def test_all_tasks_at_once_are_apart_and_still_quiet(form, n):
    moments = tasks(form, n=n)
    others = leave_one_out(moments)
    contrastive = get_solver("contrastive")
    alone = [contrastive(o, RANK, own=m) for o, m in zip(others, moments, strict=True)]
    found = solve_jointly(moments, [RANK] * 5)
    for a, b in itertools.combinations(range(5), 2):
        apart = overlap_of(found[a].basis, found[b].basis)
        assert apart < 1e-2
        assert apart < 0.1 * overlap_of(alone[a].basis, alone[b].basis)
    for joint, single in zip(found, alone, strict=True):
        # Energy below the ridge (balance times the mean) counts as none to contrastive as well.
        ridge = RANK * 0.01 * single.total_other / D
        assert joint.captured_other <= 1.5 * single.captured_other + ridge
        assert joint.captured_own >= 0.7 * single.captured_own
        assert joint.cost.seconds > 0
    shares = [f.captured_own / a.captured_own for f, a in zip(found, alone, strict=True)]
    assert max(shares) < 1.4 * min(shares)  # no task pays for the others


@forms
@pytest.mark.parametrize("n", [10, 300])
def test_the_order_of_the_tasks_makes_a_small_difference(form, n):
    moments = tasks(form, n=n)
    first = solve_jointly(moments, [RANK] * 5)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        found = solve_jointly([moments[i] for i in order], [RANK] * 5)
        for place, task in enumerate(order):
            same = overlap_of(found[place].basis, first[task].basis) / RANK
            assert same > 0.8
            assert found[place].captured_own == pytest.approx(first[task].captured_own, rel=0.2)


@forms
def test_more_rows_than_dimensions_are_still_shared_out(form):
    moments = [FORMS[form](rows_of(t, n=6, d=16)) for t in range(6)]
    found = solve_jointly(moments, [5] * 6)  # 30 rows in 16 dimensions
    for item, moment in zip(found, moments, strict=True):
        eye = torch.eye(5, dtype=torch.float64)
        assert torch.linalg.matrix_norm(item.basis @ item.basis.T - eye) < 1e-10
        assert item.captured_own == pytest.approx(float(moment.energies(item.basis).sum()))
    crowd = torch.cat([f.basis for f in found])
    spread = torch.linalg.svdvals(crowd).square()
    assert float(spread.max()) < 6  # all six in one place would give 6


@forms
def test_ranks_weights_and_rows_outside_the_set_are_taken_in(form):
    moments, outside = tasks(form, 4), orthonormal_rows(normal(5, D, seed=7))
    found = solve_jointly(moments, [1, 2, 3, 4], taken=outside)
    assert [len(f.basis) for f in found] == [1, 2, 3, 4]
    assert all(overlap_of(f.basis, outside) < 1e-2 for f in found)
    even = solve_jointly(moments, [RANK] * 4)
    heavy = solve_jointly(moments, [RANK] * 4, weights=[1.0, 1.0, 1.0, 50.0])
    assert float(moments[3].energies(heavy[0].basis).sum()) < float(
        moments[3].energies(even[0].basis).sum()
    )


def test_features_of_few_directions_get_rows_apart_under_seeds_of_their_own():
    """One row a task (granularity task_mean): what fills up must not be the same for all."""
    moments = [RowMoment.from_rows(rows_of(t, n=1)) for t in range(4)]
    found = solve_jointly(moments, [RANK] * 4)
    for a, b in itertools.combinations(found, 2):
        assert overlap_of(a.basis, b.basis) < 1e-2


def test_what_joint_cannot_do_is_said():
    own, *rest = tasks("full", 3)
    other = leave_one_out([own, *rest])[0]
    solver = get_solver("joint")
    with pytest.raises(SubspaceError, match="negative"):
        solver(other, RANK, own=own, overlap=-1.0)
    with pytest.raises(SubspaceError, match="balance must be positive"):
        solver(other, RANK, own=own, taken=normal(2, D), balance=0.0)
    with pytest.raises(SubspaceError, match="--own"):
        solver(other, RANK, taken=normal(2, D))
    with pytest.raises(SubspaceError, match=f"a layer with {D} inputs"):
        get_solver("joint")(other, RANK, own=own, taken=normal(2, D + 1))
    with pytest.raises(SubspaceError, match="NaN"):
        solver(other, RANK, own=own, taken=torch.full((2, D), torch.nan).double())
    for name in ("min_eigen", "null_space", "contrastive", "random_orthonormal"):
        with pytest.raises(SubspaceError, match="use 'joint'"):
            get_solver(name)(other, RANK, own=own, taken=normal(2, D))
    with pytest.raises(OrthomergeError, match="at least two"):
        solve_jointly([own], [RANK])
    with pytest.raises(SubspaceError, match="does not fit"):
        solve_jointly([own, *rest], [RANK, D + 1, RANK])
    with pytest.raises(SubspaceError, match="ranks"):
        solve_jointly([own, *rest], [RANK])

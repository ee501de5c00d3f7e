"""How much room the others leave: dominant and quiet directions, and ranks handed out by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import SubspaceError
from orthomerge.moments import RowMoment, SecondMoment, SketchMoment
from orthomerge.subspace import (
    allocate_ranks,
    dominant_directions,
    low_energy_directions,
    project_rows_out,
)

D = 30
FORMS = {
    "full": lambda h: SecondMoment(D).update(h),
    "rows": lambda h: RowMoment.from_rows(h),
    "sketch": lambda h: SketchMoment(D, 29).update(h),
}
forms = pytest.mark.parametrize("form", list(FORMS))


def rows_of(n, seed=0, decay=0.8):
    g = torch.Generator().manual_seed(400 + seed)
    scale = decay ** torch.arange(D, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))
    return (torch.randn(n, D, generator=g, dtype=torch.float64) * scale) @ turn


@forms
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("n", [1, 12, 28])
def test_dominant_directions_are_the_fewest_that_hold_the_share(form, share, n):
    moment = FORMS[form](rows_of(n))
    values, vectors = torch.linalg.eigh(moment.matrix)
    held = torch.cumsum(values.flip(0), dim=0) / values.sum()
    count = int((held < share - 1e-12).sum()) + 1
    found = dominant_directions(moment, share=share)
    assert found.shape == (count, D)
    eye = torch.eye(count, dtype=torch.float64)
    assert torch.linalg.matrix_norm(found @ found.T - eye) <= 1e-10
    top = vectors.flip(1)[:, :count]
    torch.testing.assert_close(found.T @ found, top @ top.T, atol=1e-6, rtol=0)
    left = moment.trace - float(moment.energies(found).sum())
    assert left <= (1 - share + 1e-9) * moment.trace
    energies = moment.energies(found)
    assert bool((energies[1:] <= energies[:-1] * (1 + 1e-9) + 1e-12 * moment.trace).all())


@forms
@pytest.mark.parametrize("most", [0, 1, 3])
def test_dominant_directions_are_cut_at_most(form, most):
    moment = FORMS[form](rows_of(12))
    found = dominant_directions(moment, share=0.9999, most=most)
    assert found.shape == (most, D)
    torch.testing.assert_close(found, dominant_directions(moment, share=0.9999)[:most])


@forms
def test_a_silent_moment_has_no_dominant_direction(form):
    found = dominant_directions(FORMS[form](torch.zeros(4, D).double()))
    assert found.shape == (0, D)
    rows = rows_of(3)
    assert torch.equal(project_rows_out(rows, found), rows)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SubspaceError, match="leaves 1 % of"):
        dominant_directions(FORMS["full"](rows_of(9)), share=share)


@forms
def test_what_is_projected_out_is_gone_and_the_rest_stays(form):
    directions = dominant_directions(FORMS[form](rows_of(12)), share=0.9)
    rows = rows_of(6, seed=1, decay=1.0)
    left = project_rows_out(rows, directions)
    assert float((left @ directions.T).norm()) <= 1e-12 * float(rows.norm())
    torch.testing.assert_close(project_rows_out(left, directions), left)
    removed = rows - left
    torch.testing.assert_close(project_rows_out(removed, directions), torch.zeros_like(rows))
    assert float((removed * left).sum(dim=1).abs().max()) <= 1e-12 * float(rows.square().sum())


@forms
@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 29),
    seed=st.integers(0, 999),
    energy=st.floats(1e-6, 3.0),
    decay=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_low_energy_directions_are_counted_as_eigvalsh_counts_them(form, n, seed, energy, decay):
    moment = FORMS[form](rows_of(n, seed, decay))
    values = torch.linalg.eigvalsh(moment.matrix)
    limit = energy * float(values.sum()) / D
    surely = int((values <= limit * (1 - 1e-9) - 1e-15).sum())
    perhaps = int((values <= limit * (1 + 1e-9) + 1e-15).sum())
    assert surely <= low_energy_directions(moment, energy) <= perhaps


@forms
def test_all_of_a_silent_moment_is_quiet_and_an_energy_must_be_positive(form):
    assert low_energy_directions(FORMS[form](torch.zeros(4, D).double()), 0.1) == D
    for energy in (0.0, -1.0, float("nan")):
        with pytest.raises(SubspaceError, match="positive"):
            low_energy_directions(FORMS[form](rows_of(9)), energy)


rooms = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 90), min_size=1)


@settings(deadline=None, max_examples=200)
@given(room=rooms, rank=st.integers(1, 16), factor=st.integers(1, 4))
def test_ranks_stay_within_the_room_and_keep_their_sum_where_there_is_some(room, rank, factor):
    most = rank * factor
    ranks = allocate_ranks(room, rank, most=most)
    assert list(ranks) == list(room)
    for layer, r in ranks.items():
        assert 1 <= r <= most
        assert r <= max(room[layer], 1)
        # Nobody gives up what it has room for.
        assert r >= min(rank, max(room[layer], 1))
    wanted = rank * len(room)
    capacity = sum(min(max(free, 1), most) for free in room.values())
    assert sum(ranks.values()) == min(wanted, capacity)
    assert allocate_ranks(dict(reversed(room.items())), rank, most=most).keys() == ranks.keys()
    assert allocate_ranks(room, rank, most=most) == ranks


def test_spare_rank_goes_where_there_is_most_room():
    ranks = allocate_ranks({"crowded": 2, "wide": 100, "narrow": 10, "none": 0}, 8)
    assert ranks == {"crowded": 2, "wide": 21, "narrow": 8, "none": 1}
    assert allocate_ranks({"a": 500, "b": 500}, 8) == {"a": 8, "b": 8}
    assert allocate_ranks({"a": 1, "b": 1000}, 8) == {"a": 1, "b": 15}
    assert allocate_ranks({"a": 0, "b": 1000}, 8, most=10) == {"a": 1, "b": 10}


def test_a_cap_below_the_rank_is_refused():
    for rank, most in ((0, 4), (8, 7)):
        with pytest.raises(SubspaceError, match="1 <= rank <= most"):
            allocate_ranks({"a": 9}, rank, most=most)

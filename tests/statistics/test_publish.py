"""What `Statistics.published` keeps, how large its noise is, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from orthomerge.errors import StatisticsError
from orthomerge.moments import MeanMoment, RowMoment, SecondMoment, SketchMoment
from orthomerge.statistics import Statistics, StatisticsMeta
from orthomerge.statistics.publish import normal_source
from orthomerge.subspace import get_solver

DIM = 24


def rows(count=200):
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(1, -2, DIM, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    return (torch.randn(count, DIM, generator=generator, dtype=torch.float64) * scale) @ turn


def holding(**moments) -> Statistics:
    meta = StatisticsMeta("tiny", "c", ["x"], "token", samples=9)
    return Statistics(moments, {name: name for name in moments}, meta)


def all_kinds() -> Statistics:
    return holding(
        full=SecondMoment(DIM).update(rows()),
        rows=RowMoment(DIM, 300).update(rows()),
        sketch=SketchMoment(DIM, 12).update(rows()),
    )


@pytest.mark.parametrize("lead", ["full", "rows", "sketch"])
def test_without_noise_the_top_directions_stay_and_the_slack_bounds_the_rest(lead):
    whole = all_kinds()
    part = whole.published(5).moments[lead]
    exact = whole.moments["full"].matrix
    assert isinstance(part, RowMoment)
    assert part.factor.shape == (5, DIM)
    assert not part.exact
    assert part.count == 200
    left = torch.linalg.eigvalsh(exact - part.matrix)
    assert float(left[0]) >= -1e-9
    assert float(left[-1]) <= part.slack + 1e-9
    values, vectors = torch.linalg.eigh(whole.moments[lead].matrix)
    kept = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    torch.testing.assert_close(part.matrix, kept)
    assert part.slack == pytest.approx(float(values[-6]) + whole.moments[lead].slack)


def test_all_directions_of_a_full_moment_leave_nothing_out():
    whole = holding(full=SecondMoment(DIM).update(rows()))
    part = whole.published(DIM).moments["full"]
    torch.testing.assert_close(part.matrix, whole.moments["full"].matrix)
    assert part.slack == 0


def test_noise_on_a_full_moment_has_the_stated_size_and_is_symmetric():
    """All directions kept of a moment far from zero: what was added can be read off."""
    dim = 60
    base = torch.eye(dim, dtype=torch.float64) * 10
    whole = holding(full=SecondMoment.from_matrix(base, 50))
    noise = whole.published(dim, 0.05, seed=1).moments["full"].matrix - base
    size = 0.05 * 10  # σ tr(S) / d
    upper = noise[tuple(torch.triu_indices(dim, dim))]
    assert float(upper.std()) == pytest.approx(size, rel=0.1)
    assert float(torch.diagonal(noise).std()) == pytest.approx(size, rel=0.35)
    assert abs(float(upper.mean())) < 4 * size / math.sqrt(len(upper))
    torch.testing.assert_close(noise, noise.T)


def test_noise_on_a_factor_has_the_stated_size_on_every_scaled_direction():
    dim, kept = 4000, 3
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    whole = holding(rows=RowMoment.from_factor(factor, 6))
    clean = whole.published(kept).moments["rows"].factor
    noisy = whole.published(kept, 0.5, seed=1).moments["rows"].factor
    added = noisy - clean
    energy = float(factor.square().sum()) / dim
    for row in added:
        assert float(row.std()) == pytest.approx(0.5 * energy**0.5, rel=0.05)


def test_noise_is_fresh_without_a_seed_and_the_same_under_one():
    whole = all_kinds()
    for lead in whole.moments:
        drawn = [whole.published(4, 0.1).moments[lead].matrix for _ in range(2)]
        assert not torch.allclose(*drawn)
        again = [whole.published(4, 0.1, seed=7).moments[lead].matrix for _ in range(2)]
        assert torch.equal(*again)
    assert not torch.allclose(
        whole.published(4, 0.1, seed=7).moments["rows"].matrix,
        whole.published(4, 0.1, seed=8).moments["rows"].matrix,
    )


@pytest.mark.parametrize("seed", [None, 3])
def test_draws_are_standard_normal(seed):
    drawn = normal_source(seed)(200, 200)
    assert drawn.shape == (200, 200)
    assert bool(drawn.isfinite().all())
    assert abs(float(drawn.mean())) < 0.03
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.02)


def test_a_mean_and_a_sample_can_be_published():
    whole = Statistics(
        {"m": MeanMoment(DIM).update(rows()), "s": RowMoment(DIM, 8).update(rows())},
        {"m": "m", "s": "s"},
        StatisticsMeta("tiny", "c", ["x"], "token", samples=9),
    )
    part = whole.published(3, 0.2)
    assert part.moments["m"].factor.shape == (1, DIM)
    assert part.moments["s"].factor.shape == (3, DIM)
    assert part.moments["s"].slack is None  # a sample bounds nothing
    assert part.moments["m"].slack >= 0


def test_a_wide_factor_is_published_without_a_square_matrix():
    """14,336 wide, a Llama's down_proj: the square would be 1.6 GB."""
    whole = holding(sketch=SketchMoment(14336, 8).update(torch.randn(20, 14336)))
    part = whole.published(4, 0.1).moments["sketch"]
    assert part.factor.shape == (4, 14336)


def test_the_file_says_what_was_done_and_solvers_take_it(tmp_path):
    whole = all_kinds()
    path = whole.published(5, 0.05, seed=1).save(tmp_path / "p")
    part = Statistics.load(path)
    assert (part.meta.directions, part.meta.noise) == (5, 0.05)
    # A kept row sticks out where noise was drawn: only the part kept is free of others.
    for lead in part.moments:
        for name in ("min_eigen", "null_space", "contrastive"):
            solver = get_solver(name)
            own = whole.moments["full"] if solver.needs_own else None
            found = solver(part.moment(lead), 4, own=own, seed=0)
            strong = float(whole.moments["full"].trace) / DIM
            seen = float(whole.moments["full"].energies(found.basis).mean())
            assert seen < 0.5 * strong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), f"0 directions of layer 'full' cannot be published: .* 1 to {DIM}"),
        ((DIM + 1,), f"{DIM + 1} directions of layer 'full' cannot be published"),
        ((3, -0.1), "noise is not negative"),
        ((3, math.nan), "noise is not negative and finite"),
        ((3, math.inf), "noise is not negative and finite"),
    ],
)
def test_what_cannot_be_published_is_said(arguments, words):
    with pytest.raises(StatisticsError, match=words) as caught:
        all_kinds().published(*arguments)
    assert "\n" not in str(caught.value)


def test_a_published_part_is_neither_published_nor_merged_again():
    part = all_kinds().published(3)
    with pytest.raises(StatisticsError, match="top 3 directions of something already"):
        part.published(2)
    for act in (lambda: part + all_kinds(), lambda: all_kinds() + part, lambda: part - part):
        with pytest.raises(StatisticsError, match="published part does not add up"):
            act()

"""Refits of existing updates against dense least squares in float64, and what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.adapters.refit import measure, refit_low_energy, refit_rows, refit_within
from orthomerge.errors import SubspaceError
from orthomerge.factors import LoraFactors
from orthomerge.merging import merge_layers
from orthomerge.moments import Moment, RowMoment, SecondMoment, combine
from orthomerge.subspace import dominant_directions, orthonormal_rows

D, OUT, R = 12, 9, 3


def drawn(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def update(seed: int = 0, scaling: float = 2.0) -> LoraFactors:
    return LoraFactors(drawn(seed, R, D), drawn(seed + 1, OUT, R), scaling)


def moment(rows: torch.Tensor, form: str) -> Moment:
    if form == "rows":
        return RowMoment.from_rows(rows)
    return SecondMoment.from_matrix(rows.T @ rows / len(rows), len(rows))


FORMS = pytest.mark.parametrize("form", ["rows", "full"])


@pytest.mark.parametrize("scaling", [2.0, 16 / 8**0.5])
def test_the_weight_refit_is_least_squares_on_the_dense_update(scaling):
    before, rows = update(scaling=scaling), drawn(5, R, D)
    after = refit_rows(before, rows)
    solution = torch.linalg.lstsq(scaling * rows.T, before.delta().T).solution.T
    torch.testing.assert_close(after.B, solution)
    assert after.scaling == scaling and torch.equal(after.A, rows)


@FORMS
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_output_refit_is_least_squares_on_the_outputs(form, ridge):
    before, rows, H = update(), drawn(5, R, D), drawn(6, 7, D)
    own = moment(H, form)
    after = refit_rows(before, rows, own, ridge=ridge)
    level = ridge * float(H.square().sum()) / len(H) / D
    seen = torch.cat([H / len(H) ** 0.5, level**0.5 * torch.eye(D, dtype=H.dtype)])
    target = (before.delta() @ seen.T).T
    solution = torch.linalg.lstsq(before.scaling * (rows @ seen.T).T, target).solution.T
    torch.testing.assert_close(after.B, solution, rtol=1e-6, atol=1e-8)


@FORMS
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("ridge", [0.05, 0.0])
def test_the_projection_is_the_best_update_out_of_the_directions(form, within, ridge):
    before, H = update(), drawn(6, 7 if form == "rows" else 40, D)
    directions = orthonormal_rows(drawn(7, 5, D))
    after = refit_within(before, directions, moment(H, form), within=within, ridge=ridge)
    rest = torch.linalg.svd(directions).Vh[5:]
    Z = directions if within else rest  # the rows may be any of Z's span
    level = ridge * float(H.square().sum()) / len(H) / D
    seen = torch.cat([H / len(H) ** 0.5, level**0.5 * torch.eye(D, dtype=H.dtype)])
    whole = before.delta()
    start = whole @ Z.T @ Z
    step = torch.linalg.lstsq(seen @ Z.T, ((whole - start) @ seen.T).T, driver="gelsd").solution.T
    torch.testing.assert_close(after.delta(), start + step @ Z, rtol=1e-6, atol=1e-8)
    outside = directions if not within else rest
    assert float((after.A @ outside.T).abs().max()) < 1e-12


@FORMS
@pytest.mark.parametrize("balance", [0.0, 1.0, 7.0])
def test_quiet_is_the_minimum_of_what_it_weighs(form, balance):
    before, own, others = update(), drawn(6, 5, D), drawn(7, 6, D)
    found = refit_low_energy(before, moment(own, form), moment(others, form), balance=balance)
    level = 0.1 * float(own.square().sum()) / 5 / D
    stacked = torch.cat(
        [own / 5**0.5, (balance / 6) ** 0.5 * others, level**0.5 * torch.eye(D, dtype=own.dtype)]
    )
    whole = before.delta()
    target = torch.cat([own @ whole.T / 5**0.5, 0 * others @ whole.T, level**0.5 * whole.T])
    solution = torch.linalg.lstsq(stacked, target).solution.T
    torch.testing.assert_close(found.delta(), solution, rtol=1e-6, atol=1e-8)


def test_quiet_with_all_others_in_it_sums_to_regmean():
    tasks = [update(10 * t) for t in range(3)]
    moments = [moment(drawn(50 + t, 40, D), "full") for t in range(3)]
    quiet = [
        {"l": refit_low_energy(
            tasks[t], moments[t], combine([m for u, m in enumerate(moments) if u != t]),
            balance=2.0, ridge=0.0,
        )}
        for t in range(3)
    ]  # fmt: skip
    ours = merge_layers(quiet, method="task_arithmetic", weights=1.0).dense("l")
    dense = sum(t.delta() @ m.matrix for t, m in zip(tasks, moments, strict=True))
    assert isinstance(dense, torch.Tensor)
    torch.testing.assert_close(ours, dense @ torch.linalg.inv(sum(m.matrix for m in moments)))


seeds = st.integers(0, 2**20)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_rows_that_span_those_of_A_lose_nothing(seed, outputs):
    before = update(seed)
    rows = torch.cat([drawn(seed + 3, R, R) @ before.A, drawn(seed + 4, 2, D)])
    own = moment(drawn(seed + 5, 40, D), "full")
    after = refit_rows(before, rows, own if outputs else None, ridge=0.0)
    lost = measure(before, after, own, own)
    assert lost.share_of_weights < 1e-4 and lost.share_of_outputs < 1e-4


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_output_refit_never_loses_more_outputs_than_the_weight_refit(seed, ridge):
    before, rows = update(seed), drawn(seed + 3, R, D)
    own = moment(drawn(seed + 5, 20, D), "rows")
    losses = [
        measure(before, refit_rows(before, rows, kept, ridge=ridge), own, own).own_lost
        for kept in (own, None)
    ]
    assert losses[0] <= losses[1] * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_the_basis_of_the_rows_does_not_matter(seed, outputs):
    before, rows = update(seed), orthonormal_rows(drawn(seed + 3, R, D))
    own = moment(drawn(seed + 5, 20, D), "full") if outputs else None
    turned = torch.linalg.qr(drawn(seed + 4, R, R)).Q * torch.tensor([1.0, 3.0, 0.5]) @ rows
    one, two = (refit_rows(before, r, own).delta() for r in (rows, turned))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_more_balance_is_heard_less_and_loses_more():
    before, own, others = update(), moment(drawn(1, 30, D), "full"), moment(drawn(2, 30, D), "full")
    losses = [
        measure(before, refit_low_energy(before, own, others, balance=b), own, others)
        for b in (0.0, 0.3, 1.0, 5.0)
    ]
    heard, lost = [x.heard_after for x in losses], [x.share_of_outputs for x in losses]
    assert heard == sorted(heard, reverse=True) and lost == sorted(lost)
    assert lost[0] == pytest.approx(0, abs=1e-7) and heard[0] == losses[0].heard_before


def test_what_does_not_fit_is_refused():
    before, own = update(), moment(drawn(1, 30, D), "full")
    with pytest.raises(SubspaceError, match="the adapter has 12 inputs and the rows 11"):
        refit_rows(before, drawn(1, R, 11))
    with pytest.raises(SubspaceError, match="ridge -1"):
        refit_low_energy(before, own, own, ridge=-1.0)
    with pytest.raises(SubspaceError, match="balance"):
        refit_low_energy(before, own, own, balance=-1.0)
    assert len(dominant_directions(own, share=0.5)) < D

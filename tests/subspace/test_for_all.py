"""All tasks at once gives what one after the other gives."""

from __future__ import annotations

import pytest
import torch

from orthomerge.errors import SubspaceError
from orthomerge.moments import RowMoment, SecondMoment, SketchMoment, leave_one_out
from orthomerge.subspace import get_solver, list_solvers

D, TASKS, RANK = 80, 4, 5


def rows(task: int, count: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(task)
    scale = torch.linspace(2.0, 0.2, D, dtype=torch.float64)
    return torch.randn(count, D, generator=generator, dtype=torch.float64) * scale


def moments(form: str) -> list:
    data = [rows(t) for t in range(TASKS)]
    if form == "rows":
        return [RowMoment.from_rows(h) for h in data]
    if form == "sketch":
        return [SketchMoment(D, 8).update(h) for h in data]
    return [SecondMoment(D).update(h) for h in data]


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(a @ b.T).min())


@pytest.mark.parametrize("form", ["rows", "sketch", "full"])
@pytest.mark.parametrize("name", [s.name for s in list_solvers() if s.name != "joint"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_all_tasks_at_once_is_each_alone(name, form, weights):
    given, solver = moments(form), get_solver(name)
    found = solver.for_all(given, [RANK] * TASKS, weights=weights, seeds=[7, 8, 9, 10])
    for t, other in enumerate(leave_one_out(given, weights)):
        alone = solver(other, RANK, own=given[t], seed=7 + t)
        assert overlap(found[t].basis, alone.basis) > 1 - 1e-8
        assert found[t].captured_other == pytest.approx(alone.captured_other, rel=1e-6, abs=1e-18)
        assert found[t].captured_own == pytest.approx(alone.captured_own, rel=1e-8)
        assert found[t].total_other == pytest.approx(alone.total_other)
        assert found[t].admissible == alone.admissible
        assert found[t].slack == pytest.approx(alone.slack)
        assert found[t].cost.seconds > 0


def test_what_is_refused():
    with pytest.raises(SubspaceError, match="leave 44 of 80 dimensions free"):
        get_solver("null_space").for_all(moments("rows"), [60] * TASKS)
    with pytest.raises(SubspaceError, match="give one per task"):
        get_solver("null_space").for_all(moments("rows"), [3])
    with pytest.raises(SubspaceError, match="did you mean 'tie'"):
        get_solver("null_space").for_all(moments("rows"), [3] * TASKS, tye="own")

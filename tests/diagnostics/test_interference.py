from __future__ import annotations

import pytest
import torch

from orthomerge.adapters import Adapter
from orthomerge.diagnostics import interference
from orthomerge.errors import StatisticsError
from orthomerge.factors import LoraFactors
from orthomerge.moments import SecondMoment
from orthomerge.statistics import Statistics, StatisticsMeta


def made(seed):
    g = torch.Generator().manual_seed(seed)
    layers = {
        f"bert.layer.{i}.query": LoraFactors(
            torch.randn(2, 6, generator=g, dtype=torch.float64),
            torch.randn(5, 2, generator=g, dtype=torch.float64),
            1.0 + seed,
        )
        for i in range(2)
    }
    rows = {f"layer.{i}.query": torch.randn(9, 6, generator=g).double() for i in range(2)}
    meta = StatisticsMeta("m", "h", ["query"], "token", 9)
    stats = Statistics(
        {n: SecondMoment(6).update(h) for n, h in rows.items()}, {n: n for n in rows}, meta
    )
    return Adapter(f"a{seed}", layers), stats, rows


def test_interference_equals_the_dense_quotient_of_outputs():
    adapters, stats, rows = zip(*(made(s) for s in range(3)), strict=True)
    found = interference(adapters, stats)
    for i, a in enumerate(adapters):
        for j, h in enumerate(rows):
            other = own = 0.0
            for n in range(2):
                x = h[f"layer.{n}.query"]
                disturb = (x @ a.layers[f"bert.layer.{n}.query"].delta().T).norm() ** 2
                mine = (x @ adapters[j].layers[f"bert.layer.{n}.query"].delta().T).norm() ** 2
                one = found.layers[f"bert.layer.{n}.query"][i, j]
                assert float(one) == pytest.approx(float((disturb / mine).sqrt()))
                other, own = other + disturb, own + mine
            assert float(found.matrix[i, j]) == pytest.approx(float((other / own).sqrt()))
    torch.testing.assert_close(found.matrix.diagonal(), torch.ones(3, dtype=torch.float64))


def test_an_adapter_orthogonal_to_a_tasks_inputs_does_not_disturb_it():
    (a, sa, _), (b, sb, rows) = made(0), made(1)
    silent = {}
    for n in range(2):
        h = torch.zeros(9, 6, dtype=torch.float64)
        h[:, :3] = rows[f"layer.{n}.query"][:, :3]
        sb.moments[f"layer.{n}.query"] = SecondMoment(6).update(h)
        old = a.layers[f"bert.layer.{n}.query"]
        A = old.A.clone()
        A[:, :3] = 0
        silent[f"bert.layer.{n}.query"] = LoraFactors(A, old.B, old.scaling)
    found = interference([Adapter("silent", silent), b], [sa, sb])
    assert float(found.matrix[0, 1]) == 0.0
    assert float(found.matrix[1, 0]) > 0.0


def test_as_many_statistics_as_adapters():
    a, s, _ = made(0)
    with pytest.raises(StatisticsError, match="one statistics file an adapter"):
        interference([a, a], [s])

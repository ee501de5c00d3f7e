"""The predicted shift equals the dense outputs it speaks of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interference import made

from orthomerge.adapters import Adapter
from orthomerge.diagnostics import BESIDE, couplings, interference_of, predict_shift, shift_of_sum
from orthomerge.errors import MergeError
from orthomerge.merging import MergedLayer, iter_merge

LAYERS = [f"bert.layer.{n}.query" for n in range(2)]


def dense_shift(update, adapter, rows):
    """By the outputs themselves; `update` maps layers to dense updates."""
    terms = own = 0.0
    for n, name in enumerate(LAYERS):
        x = rows[f"layer.{n}.query"]
        scale = len(x) ** 0.5
        mine, merged = x @ adapter.layers[name].delta().T / scale, x @ update[name].T / scale
        a = mine.norm()
        along = (mine * merged).sum() / a
        beside = (merged - along * mine / a).norm()
        terms, own = terms + ((a - along) ** 2 + (BESIDE * beside) ** 2).sqrt(), own + a
    return float(terms / own)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_shift_of_a_sum_is_that_of_its_outputs(weights):
    adapters, stats, rows = zip(*(made(s) for s in range(3)), strict=True)
    found = shift_of_sum(couplings(adapters, stats), weights)
    summed = {
        n: sum(w * a.layers[n].delta() for w, a in zip(weights, adapters, strict=True))
        for n in LAYERS
    }
    for t in range(3):
        expected = dense_shift(summed, adapters[t], rows[t])
        assert float(found.total[t]) == pytest.approx(expected, abs=1e-6)
    parts = torch.stack(list(found.layers.values())).sum(dim=0)
    torch.testing.assert_close(parts, found.total)


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {}), ("ties", {"density": 0.5}), ("emr", {}), ("knots_ta", {})],
)
def test_any_merge_is_held_to_its_own_outputs(method, options):
    adapters, stats, rows = zip(*(made(s) for s in range(3)), strict=True)
    layers = [a.layers for a in adapters]
    merged = list(iter_merge(layers, method=method, weights=0.5, **options))
    found = predict_shift(merged, adapters, stats)
    for t in range(3):
        updates = {m.name: m.tasks[t] if m.tasks else m.update for m in merged}
        dense = {n: u if isinstance(u, torch.Tensor) else u.delta() for n, u in updates.items()}
        expected = dense_shift(dense, adapters[t], rows[t])
        assert float(found.total[t]) == pytest.approx(expected, rel=1e-5)


def test_an_adapter_alone_at_weight_1_is_not_shifted_and_at_0_is_lost_whole():
    adapter, stats, _ = made(0)
    found = couplings([adapter], [stats])
    assert float(shift_of_sum(found, [1.0]).total[0]) == pytest.approx(0.0, abs=1e-6)
    gone = shift_of_sum(found, [0.0])
    assert float(gone.total[0]) == pytest.approx(1.0)
    assert float(gone.kept[0]) == 0.0


def test_weights_by_layer_act_on_their_layers_alone():
    adapters, stats, _ = zip(*(made(s) for s in range(2)), strict=True)
    found = couplings(adapters, stats)
    whole = shift_of_sum(found, [0.5, 0.5])
    halved = shift_of_sum(found, {LAYERS[0]: [0.5, 0.5], LAYERS[1]: [0.0, 0.0]})
    torch.testing.assert_close(halved.layers[LAYERS[0]], whole.layers[LAYERS[0]])
    assert not torch.allclose(halved.layers[LAYERS[1]], whole.layers[LAYERS[1]])
    for wrong in ([1.0], {LAYERS[0]: [1.0, 1.0]}):
        with pytest.raises(MergeError, match="do not match"):
            shift_of_sum(found, wrong)


def test_a_layer_that_a_task_does_not_adapt_only_adds_to_what_lies_beside():
    (a, sa, _), (b, sb, rows) = made(0), made(1)
    part = Adapter("part", {LAYERS[0]: b.layers[LAYERS[0]]})
    merged = [MergedLayer(n, a.layers[n]) for n in LAYERS]
    found = predict_shift(merged, [a, part], [sa, sb])
    x = rows["layer.1.query"]
    out = float((x @ a.layers[LAYERS[1]].delta().T).norm())
    mine = float((rows["layer.0.query"] @ b.layers[LAYERS[0]].delta().T).norm())
    assert float(found.layers[LAYERS[1]][1]) == pytest.approx(BESIDE * out / mine, rel=1e-5)


def test_interference_is_the_diagonal_of_couplings():
    adapters, stats, _ = zip(*(made(s) for s in range(3)), strict=True)
    K = couplings(adapters, stats).total
    found = interference_of(couplings(adapters, stats)).matrix
    expected = (K[2, 1, 1] / K[2, 2, 2]).sqrt()
    assert float(found[1, 2]) == pytest.approx(float(expected))

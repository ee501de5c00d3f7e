"""Starts by every solver from every representation, for all tasks at once, beside existing ones."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import make_texts, tiny_bert
from peft import PeftModel

from orthomerge import linalg
from orthomerge.adapters import (
    Adapter,
    OsrmConfig,
    excluded_directions,
    initialize_osrm_weights,
    lora_layers,
    new_lora,
    plan_ranks,
    save_start,
    settled,
    start_adapter,
)
from orthomerge.errors import AdapterError, RecipeError, StatisticsError, SubspaceError
from orthomerge.factors import LoraFactors
from orthomerge.moments import Representation, RowMoment
from orthomerge.statistics import Statistics, batches, collect_statistics
from orthomerge.subspace import list_solvers

D, RANK = 32, 4
TARGETS = ["query", "value"]
FORMS = {
    "full": Representation("full"),
    "rows": Representation("rows"),
    "sketch": Representation("sketch", size=30),
}
MIXED = ["full", "rows", "sketch", "rows"]


@pytest.fixture(scope="module")
def collected(tiny_tokenizer):
    """Statistics of four tasks of five rows each, in every form; one row a text."""

    def collect(form, seed):
        return collect_statistics(
            tiny_bert(),
            batches([(t, None) for t in make_texts(5, 10 + seed)], tiny_tokenizer),
            TARGETS,
            granularity="sample",
            representation=FORMS[form],
        )

    found = {form: [collect(form, seed) for seed in range(4)] for form in FORMS}
    found["mixed"] = [found[form][i] for i, form in enumerate(MIXED)]
    return found


def lora(seed=0, **changes):
    options = {"targets": TARGETS, "rank": RANK, "alpha": 8, "task_type": "SEQ_CLS"}
    return new_lora(tiny_bert(), seed=seed, **{**options, **changes})


def rows_of(model):
    return {
        name: layer.lora_A["default"].weight.detach().double().clone()
        for name, layer in lora_layers(model).items()
    }


def started(statistics, task=0, existing=(), **config):
    """The rows of a start for one of the tasks."""
    model = lora()
    others = [s for u, s in enumerate(statistics) if u != task]
    settings = OsrmConfig(**{"granularity": "sample", **config})
    found = initialize_osrm_weights(model, others, statistics[task], settings, existing=existing)
    return model, found


def spans(found):
    return {name: item.basis.T @ item.basis for name, item in found.items()}


# ------------------------------------------------------------------ solvers and representations


@pytest.mark.parametrize("form", ["full", "rows", "sketch", "mixed"])
@pytest.mark.parametrize("solver", [s.name for s in list_solvers()])
def test_every_solver_starts_from_every_form_alike(collected, solver, form, tmp_path):
    model, found = started(collected[form], solver=solver)
    eye = torch.eye(RANK, dtype=torch.float64)
    for name, layer in lora_layers(model).items():
        A = layer.lora_A["default"].weight.detach().double()
        assert torch.linalg.matrix_norm(A @ A.T - eye) <= 1e-6
        torch.testing.assert_close(A, found[name].basis, atol=1e-7, rtol=0)
        assert not layer.lora_B["default"].weight.any()
    save_start(model, tmp_path / "start")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "start", is_trainable=True)
    for name, rows in rows_of(again).items():
        torch.testing.assert_close(rows, found[name].basis, atol=1e-7, rtol=0)
    _, dense = started(collected["full"], solver=solver)
    for name, item in found.items():
        assert item.captured_other == pytest.approx(
            dense[name].captured_other, rel=1e-5, abs=1e-10 * item.total_other
        )
        if solver != "null_space_lapack":
            torch.testing.assert_close(spans(found)[name], spans(dense)[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["min_eigen", "null_space"])
def test_tasks_that_share_a_seed_do_not_share_their_rows(tiny_tokenizer, solver):
    """One row a task leaves 29 of 32 dimensions: chance alone gives a cosine near 0.3."""
    means = [
        collect_statistics(
            tiny_bert(),
            batches([(t, None) for t in make_texts(5, seed)], tiny_tokenizer),
            TARGETS,
            granularity="task_mean",
        )
        for seed in range(4)
    ]
    found = [
        started(means, task, solver=solver, granularity="task_mean", seed=3)[1] for task in range(4)
    ]
    for a, b in itertools.combinations(found, 2):
        for name in a:
            cosines = torch.linalg.svdvals(a[name].basis @ b[name].basis.T)
            assert float(cosines.mean()) < 0.6
    again = started(means, 0, solver=solver, granularity="task_mean", seed=3)[1]
    other = started(means, 0, solver=solver, granularity="task_mean", seed=4)[1]
    name = next(iter(again))
    assert torch.equal(again[name].basis, found[0][name].basis)
    assert float(torch.linalg.svdvals(again[name].basis @ other[name].basis.T).mean()) < 0.6


def test_weights_of_the_others_count(collected):
    statistics = collected["full"]
    plain = started(statistics, solver="contrastive")[1]
    heavy = started(statistics, solver="contrastive", weights=(1.0, 1.0, 50.0))[1]
    for name in plain:
        moment = statistics[3].moment(name)
        assert moment.energies(heavy[name].basis).sum() < moment.energies(plain[name].basis).sum()


@pytest.mark.parametrize("solver", ["min_eigen", "contrastive", "joint"])
@pytest.mark.parametrize("constraint", ["init", "project"])
def test_what_is_refused_leaves_the_model_as_it_was(collected, solver, constraint):
    statistics, model = collected["full"], lora(seed=5)
    before = rows_of(model)

    def refused(error, word, others=statistics[1:], own=statistics[0], existing=(), **config):
        settings = OsrmConfig(solver, **{"granularity": "sample", **config})
        settings = dataclasses.replace(settings, constraint=constraint)
        with pytest.raises(error, match=word) as said:
            initialize_osrm_weights(model, others, own, settings, existing=existing)
        assert str(said.value).count(". ") == 0
        assert all(torch.equal(rows, before[name]) for name, rows in rows_of(model).items())

    refused(StatisticsError, "2 weights for 3", weights=(1.0, 2.0))
    refused(StatisticsError, "4 weights for 3", weights=(1.0,) * 4)
    refused(StatisticsError, "not negative", weights=(1.0, -1.0, 1.0))
    refused(StatisticsError, "--granularity token", granularity="token")
    # The last layer is broken: the first must not have been set by then.
    last = list(statistics[1].moments)[-1]
    nan = RowMoment.from_factor(torch.full((2, D), torch.nan).double(), 2)
    broken = Statistics({**statistics[1].moments, last: nan}, statistics[1].layers,
                        statistics[1].meta)  # fmt: skip
    refused(SubspaceError, f"layer '{last}'.*NaN", others=[broken, *statistics[2:]])
    if solver != "min_eigen":
        refused(SubspaceError, "--own", own=None)
    if solver != "joint":
        refused(SubspaceError, "use 'joint'", existing=[Adapter("x", {})])
    else:
        factors = LoraFactors(torch.ones(1, D), torch.ones(D, 1))
        near = Adapter("near", dict.fromkeys(before, factors))
        refused(AdapterError, "'strange' adapts no layer", existing=[near, Adapter("strange", {})])


# ------------------------------------------------------------------ all tasks at once


@pytest.mark.parametrize("form", ["full", "rows", "mixed"])
def test_every_team_by_itself_comes_to_the_same_joint_choice(collected, form):
    """Whose turn it is and how the others are listed must not matter, or the starts collide."""
    statistics = collected[form]
    found = [started(statistics, task, solver="joint")[1] for task in range(4)]
    for name in found[0]:
        for a, b in itertools.combinations(found, 2):
            overlap = (a[name].basis @ b[name].basis.T).square().sum()
            assert float(overlap) < 1e-2 * RANK
    for task in range(4):
        others = [statistics[u] for u in range(4) if u != task]
        for order in (others[::-1], [others[1], others[0], others[2]]):
            model = lora()
            settings = OsrmConfig("joint", granularity="sample")
            again = initialize_osrm_weights(model, order, statistics[task], settings)
            for name, item in again.items():
                torch.testing.assert_close(
                    spans({name: item})[name], spans(found[task])[name], atol=1e-6, rtol=0
                )


def test_a_late_comer_keeps_away_from_adapters_that_exist(collected):
    statistics = collected["full"]
    existing = []
    for task in (1, 2, 3):  # trained the usual way, say: anywhere
        held = {
            f"bert.{name}": (rows, torch.ones(D, RANK), 2.0)
            for name, rows in rows_of(lora(seed=task)).items()
        }
        existing.append(Adapter(f"task {task}", adapter_factors(held)))
    before = [{n: f.A.clone() for n, f in a.layers.items()} for a in existing]
    _, near = started(statistics, solver="contrastive")
    _, found = started(statistics, solver="joint", existing=existing)
    _, gentle = started(statistics, solver="joint", existing=existing, options={"overlap": 0.1})
    for name, item in found.items():
        rows = torch.cat([a.layers[f"bert.{name}"].A.double() for a in existing])
        rows = rows / rows.norm(dim=1, keepdim=True)

        def overlap(other, rows=rows, name=name):
            return float((other[name].basis @ rows.T).square().sum())

        assert overlap(found) < 1e-2
        assert overlap(found) < 0.1 * overlap(near)
        assert overlap(found) < overlap(gentle) < overlap(near)
        assert item.captured_other < 0.5 * RANK * item.total_other / D
    for adapter, old in zip(existing, before, strict=True):
        assert all(torch.equal(f.A, old[n]) for n, f in adapter.layers.items())


def adapter_factors(held):
    return {name: LoraFactors(A.float(), B, scaling) for name, (A, B, scaling) in held.items()}


def test_adapters_of_another_model_are_no_neighbours(collected):
    wrong = Adapter("x", adapter_factors({"a.b.query": (torch.ones(2, D), torch.ones(D, 2), 1.0)}))
    with pytest.raises(AdapterError, match="adapts no layer that this start does"):
        started(collected["full"], solver="joint", existing=[wrong])
    layer = next(iter(lora_layers(lora())))
    narrow = {f"bert.{layer}": (torch.ones(2, D - 1), torch.ones(D, 2), 1.0)}
    with pytest.raises(SubspaceError, match=f"layer '{layer}'.*{D} inputs"):
        started(collected["full"], solver="joint", existing=[Adapter("x", adapter_factors(narrow))])


# ------------------------------------------------------------------ the constraint's side


def test_fields_of_version_0_1_are_read():
    with pytest.warns(DeprecationWarning, match="energy_fraction"):
        old = OsrmConfig("contrastive", constraint="project", share=0.5)
    assert old == OsrmConfig("contrastive", constraint="project", energy_fraction=0.5)
    assert old.share == 0.5
    assert dataclasses.replace(old, seed=3).energy_fraction == 0.5


SIDES = [
    *({"energy_fraction": fraction} for fraction in (0.5, 0.9, 0.999)),
    *({"subspace_dim": dim} for dim in (4, 9)),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("solver", [s.name for s in list_solvers()])
def test_a_projected_start_lies_on_the_right_side(collected, solver, side):
    statistics = collected["rows"]
    settings = OsrmConfig(solver, granularity="sample", constraint="project", **side)
    model = lora()
    found = initialize_osrm_weights(model, statistics[1:], statistics[0], settings)
    directions = excluded_directions(model, statistics[1:], statistics[0], settings)
    assert directions.within == ("subspace_dim" in side)
    eye = torch.eye(RANK, dtype=torch.float64)
    for name, item in found.items():
        rows = directions.rows[name]
        inside = (item.basis @ rows.T) @ rows
        wrong = item.basis - inside if directions.within else inside
        assert float(wrong.norm()) <= 1e-10
        assert torch.linalg.matrix_norm(item.basis @ item.basis.T - eye) <= 1e-10
        assert rows.shape[0] == side.get("subspace_dim", rows.shape[0])
        if not directions.within:
            other = sum(float(s.moment(name).energies(rows).sum()) for s in statistics[1:])
            whole = sum(s.moment(name).trace for s in statistics[1:])
            assert (
                other >= min(side["energy_fraction"], 1.0) * whole * (1 - 1e-9)
                or len(rows) == D - RANK
            )


def test_a_start_inside_the_loud_directions_is_moved_out_of_them(collected):
    """Own features that are the others', and no fear of them: all of the rows are in the way."""
    statistics = collected["full"]
    same = [statistics[0]] * 3
    settings = OsrmConfig("contrastive", granularity="sample", constraint="project",
                          energy_fraction=0.9999, options={"balance": 1e6})  # fmt: skip
    model = lora()
    found = initialize_osrm_weights(model, same, statistics[0], settings)
    directions = excluded_directions(model, same, statistics[0], settings)
    for name, item in found.items():
        assert float((item.basis @ directions.rows[name].T).norm()) <= 1e-10


def test_bad_settings_are_refused_before_any_work():
    for changes, word in (
        ({"energy_fraction": 0.0}, "between 0 and 1"),
        ({"energy_fraction": 1.0}, "between 0 and 1"),
        ({"subspace_dim": 0}, "not a number of directions"),
        ({"constraint": "projet"}, "did you mean 'project'"),
    ):
        with pytest.raises(RecipeError, match=word):
            OsrmConfig(**changes)
    with pytest.raises(SubspaceError, match="did you mean 'overlap'"):
        OsrmConfig("joint", options={"overlapp": 1.0})


# ------------------------------------------------------------------ ranks by room


def test_planned_ranks_reach_peft_with_equal_scaling_and_come_back(collected, tmp_path):
    statistics = collected["rows"]
    _, room = plan_ranks(statistics[1:], RANK, 0.05)
    assert all(D - 15 <= free <= D for free in room.values())  # 15 rows of others
    layers = list(lora_layers(lora()))
    ranks = {layers[0]: 2, layers[1]: RANK, layers[2]: 9, layers[3]: 1}
    for rslora in (False, True):
        model = lora(ranks=ranks, rslora=rslora)
        settings = OsrmConfig("contrastive", granularity="sample")
        initialize_osrm_weights(model, statistics[1:], statistics[0], settings)
        folder = save_start(model, tmp_path / f"start{rslora}")
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["rank_pattern"] == {n: r for n, r in ranks.items() if r != RANK}
        assert set(saved["alpha_pattern"]) == set(saved["rank_pattern"])
        again = PeftModel.from_pretrained(tiny_bert(), folder, is_trainable=True)
        expected = lora(rslora=rslora)
        scaling = next(iter(lora_layers(expected).values())).scaling["default"]
        for name, layer in lora_layers(again).items():
            A = layer.lora_A["default"].weight
            assert A.shape == (ranks[name], D)
            assert layer.scaling["default"] == pytest.approx(scaling)
            assert torch.equal(A, lora_layers(model)[name].lora_A["default"].weight)


def test_layers_that_read_one_input_and_have_one_rank_get_one_start(collected):
    model = lora()
    found = initialize_osrm_weights(
        model, collected["rows"][1:], collected["rows"][0], OsrmConfig(granularity="sample")
    )
    by_owner: dict[str, list[str]] = {}
    for layer, owner in collected["rows"][0].layers.items():
        by_owner.setdefault(owner, []).append(layer)
    assert any(len(layers) == 2 for layers in by_owner.values())
    for layers in by_owner.values():
        assert torch.equal(found[layers[0]].basis, found[layers[-1]].basis)


def test_each_input_is_decomposed_once_for_start_and_constraint(collected, monkeypatch):
    statistics, counted = collected["full"], []
    real = linalg.eigh
    monkeypatch.setattr(linalg, "eigh", lambda m: counted.append(m.shape) or real(m))
    model = lora()
    config = OsrmConfig("contrastive", granularity="sample", constraint="project")
    started = start_adapter(model, statistics[1:], statistics[0], config)
    # Per input: S_other once, for the solver and for the excluded directions, and the whitened own
    # moment once; query and value read one input.
    assert counted.count((D, D)) == 2 * len({id(rows) for rows in started.directions.rows.values()})
    assert len(started.chosen) == 2 * len({id(s.basis) for s in started.chosen.values()})
    assert started.config == config
    alone = lora()
    chosen = initialize_osrm_weights(alone, statistics[1:], statistics[0], config)
    directions = excluded_directions(alone, statistics[1:], statistics[0], config)
    for name, found in started.chosen.items():
        assert torch.equal(found.basis, chosen[name].basis)
        assert torch.equal(started.directions.rows[name], directions.rows[name])


def test_without_a_config_the_start_is_the_papers_and_prepare_takes_the_recommended(collected):
    statistics = [dataclasses.replace(s, meta=dataclasses.replace(s.meta, granularity="token"))
                  for s in collected["rows"]]  # fmt: skip
    chosen = initialize_osrm_weights(lora(), statistics[1:], statistics[0])
    assert chosen.config == OsrmConfig()
    started = start_adapter(lora(), statistics[1:], statistics[0])
    assert started.config == OsrmConfig.recommended()
    assert started.charges is not None


@pytest.mark.parametrize(
    ("solver", "constraint", "own", "wanted"),
    [
        (None, None, None, ("default", "penalty")),
        (None, None, 1, ("default", "penalty")),
        (None, "project", 1, ("contrastive", "project")),
        (None, "penalty", None, ("default", "penalty")),
        (None, "penalty", 1, ("default", "penalty")),
        (None, "freeze", None, ("min_eigen", "freeze")),
        ("min_eigen", None, 1, ("min_eigen", "init")),
        ("default", None, 1, ("default", "init")),
        ("joint", None, 1, ("joint", "project")),
        ("contrastive", "init", 1, ("contrastive", "init")),
    ],
)
def test_what_is_left_open_is_settled_in_one_place(solver, constraint, own, wanted):
    found = settled(solver, constraint, own)
    assert (found.solver, found.constraint) == wanted


def test_the_default_start_stays_as_peft_drew_it(collected):
    model, untouched = lora(), lora()
    config = OsrmConfig("default", granularity="sample", constraint="penalty")
    started = start_adapter(model, collected["full"][1:], None, config)
    assert started.chosen == {}
    assert started.charges is not None
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            mine = getattr(layer, part)["default"].weight
            theirs = getattr(lora_layers(untouched)[name], part)["default"].weight
            assert torch.equal(mine, theirs)
    with pytest.raises(SubspaceError, match="does not look at other adapters"):
        start_adapter(model, collected["full"][1:], None, config, existing=[Adapter("x", {})])
    with pytest.raises(RecipeError, match="knows no statistics"):
        OsrmConfig("default", constraint="project")
    with pytest.raises(StatisticsError, match="granularity"):
        start_adapter(model, collected["full"][1:], None, OsrmConfig("default"))

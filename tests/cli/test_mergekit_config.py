"""`orthomerge merge --mergekit`: what a file becomes, and what is refused in one sentence."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import call
from small_adapters import make_adapter

from orthomerge.adapters import merge_adapters, read_adapter
from orthomerge.errors import MergeError
from orthomerge.mergekit import METHODS, read_mergekit


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("mergekit")
    for seed, name in enumerate("abc"):
        make_adapter(folder / name, tiny_base, seed)
    return folder


def write(folder, method, weights=(1.0, 1.0), base="org/base", **more):
    """A configuration over the adapters a, b, ...; `own` are parameters of each model."""
    own = more.pop("own", {})
    models = [
        {"model": f"{base}+{folder / name}", "parameters": {"weight": w, **own}}
        if w is not None
        else {"model": f"{base}+{folder / name}"}
        for name, w in zip("abc", weights, strict=False)
    ]
    named = None if method == "linear" else base  # mergekit's linear takes it for a model
    values = {"merge_method": method, "models": models, "base_model": named, **more}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


PLANS = [  # mergekit's method, weights, more of the file; our method, weights, options
    ("linear", (1, 3), {}, "linear", [0.25, 0.75], {}),
    ("linear", (0.4, 0.6), {"parameters": {"normalize": False}}, "linear", [0.4, 0.6], {}),
    ("task_arithmetic", (0.5, 2), {"parameters": {"lambda": 0.5}}, "linear", [0.25, 1.0], {}),
    ("task_arithmetic", (1, 3), {"parameters": {"normalize": True}}, "linear", [0.25, 0.75], {}),
    ("ties", (0.5, 0.5), {"own": {"density": 0.4}}, "ties", [1, 1], {"density": 0.4, "lambda": 1}),
    (
        "dare_ties",
        (1, 1),
        {"own": {"density": 0.5}, "parameters": {"normalize": True, "lambda": 0.3}},
        "dare_ties",
        [1, 1],
        {"density": 0.5, "lambda": 0.3},
    ),
    ("dare_linear", (1, 2), {"own": {"density": 0.5}}, "dare_linear", [1, 2], {"density": 0.5}),
    (
        "della",
        (1, 1),
        {"own": {"density": 0.5, "epsilon": 0.1}},
        "della",
        [1, 1],
        {"density": 0.5, "epsilon": 0.2, "lambda": 1},
    ),
    (
        "breadcrumbs",
        (1, 2),
        {"own": {"density": 0.8, "gamma": 0.05}},
        "breadcrumbs",
        [1, 2],
        {"density": 0.8, "gamma": 0.05},
    ),
    ("sce", (None, None), {"parameters": {"select_topk": 0.3}}, "sce", [1, 1],
     {"select_topk": 0.3}),
    ("model_stock", (None, None), {}, "model_stock", [1, 1], {}),
    ("nuslerp", (1, 3), {}, "slerp", [1, 3], {}),
    ("slerp", (None, None), {"parameters": {"t": 0.25}}, "slerp", [0.75, 0.25], {}),
]  # fmt: skip


@pytest.mark.parametrize("method, given, more, ours, weights, options", PLANS)
def test_a_file_is_read_and_merged(
    place, tiny_base, tmp_path, method, given, more, ours, weights, options
):
    path = write(place, method, given, base=str(tiny_base), **dict(more))
    plan = read_mergekit(path)
    assert plan.adapters == [str(place / "a"), str(place / "b")]
    assert (plan.config.method, plan.config.base) == (ours, str(tiny_base))
    assert plan.config.options == options
    assert plan.config.weights == pytest.approx(weights)
    said = json.loads(
        call("merge", "--mergekit", path, "--seed", 3, "--output", tmp_path / "m", "--json")
        .partition("{")[2]
        .join(["{", ""])
    )
    assert said["method"] == ours
    expected = merge_adapters(plan.adapters, method=ours, weights=weights, seed=3, **options)
    merged = read_adapter(tmp_path / "m").layers
    for layer in expected.layers:
        gap = merged[layer].delta() - expected.dense(layer)
        assert float(gap.norm()) <= 1e-4 * float(expected.dense(layer).norm())


def test_every_method_of_the_table_is_one_of_ours():
    from orthomerge.merging import get_method

    for method in METHODS.values():
        known = get_method(method.name).options
        assert set(method.options) <= set(known)


def test_slerp_starts_at_the_base_model_and_says_what_differs(place):
    path = write(place, "slerp", (None, None), parameters={"t": 0.25})
    values = yaml.safe_load(path.read_text())
    values["base_model"] = values["models"][1]["model"]
    path.write_text(yaml.safe_dump(values))
    plan = read_mergekit(path)
    assert plan.adapters == [str(place / "b"), str(place / "a")]
    assert plan.config.weights == (0.75, 0.25)
    assert "between the whole weights" in plan.notes[0]


def test_draws_and_types_are_noted(place, tiny_base, tmp_path):
    path = write(place, "dare_linear", base=str(tiny_base), own={"density": 0.5}, dtype="bfloat16",
                 tokenizer_source="union")  # fmt: skip
    first, second = read_mergekit(path).notes
    assert "the draws are ours" in first
    assert "'dtype', 'tokenizer_source' left out" in second
    shown = call("merge", "--mergekit", path, "--output", tmp_path / "m")
    assert shown.count("note: ") == 2


def test_adapters_without_a_base_and_a_base_among_the_models(place):
    path = place / "plain.yaml"
    models = [
        {"model": str(place / n), "parameters": {"weight": w}} for n, w in (("a", 1), ("b", 2))
    ]
    models.append({"model": "org/base", "parameters": {"weight": 1}})
    values = {"merge_method": "linear", "base_model": "org/base", "models": models}
    path.write_text(yaml.safe_dump(values))
    plan = read_mergekit(path)
    assert plan.adapters == [str(place / "a"), str(place / "b")]
    assert plan.config.weights == (0.25, 0.5)  # the base weighs a quarter
    assert plan.config.base == "org/base"


REFUSED = [
    ({"method": "karcher"}, r"unknown merge method 'karcher'.*valid: linear, task_arithmetic"),
    ({"method": "linear", "slices": []}, "needs whole models"),
    ({"method": "linear", "colour": 1}, "unknown key 'colour'"),
    ({"method": "ties", "own": {"densty": 0.2}}, "unknown parameter 'densty'.*did you mean 'densi"),
    ({"method": "ties", "weights": (1.0, 2.0)}, "lets weights elect the signs"),
    ({"method": "ties", "weights": (-1.0, -1.0)}, "one positive weight"),
    ({"method": "dare_ties"}, "add 'normalize: true'"),
    ({"method": "ties", "parameters": {"rescale": True, "density": 0.3}}, "leave 'rescale' out"),
    (
        {"method": "dare_linear", "parameters": {"rescale": False, "density": 0.3}},
        "leave 'rescale' out",
    ),
    ({"method": "linear", "parameters": {"normalize": False}}, "scale the base as well"),
    ({"method": "task_arithmetic", "weights": (None, 1.0)}, "has no 'weight'"),
    ({"method": "task_arithmetic", "own": {"weight": [0, 1]}}, "by layer.*--layer-weights"),
    (
        {"method": "task_arithmetic", "own": {"weight": [{"filter": "q", "value": 1}]}},
        "by layer.*--layer-weights",
    ),
    ({"method": "slerp", "weights": (None, None)}, "has no 't'"),
    ({"method": "slerp", "weights": (None, None), "parameters": {"t": 2}}, "from 0 to 1"),
    ({"method": "nuslerp", "weights": (1, 1, 1)}, "between two adapters, not 3"),
    ({"method": "model_stock", "weights": (None,), "parameters": {"filter_wise": True}},
     "'filter_wise'"),
    ({"method": "ties", "base_model": "org/other"}, "names the bases 'org/base', 'org/other'"),
    ({"method": "linear", "base_model": "org/base"}, "one more model: list it under 'models'"),
    ({"method": "linear", "models": []}, "lists no 'models'"),
    ({"method": "linear", "models": [{"model": {"path": 1}}]}, "has no 'model' with"),
    ({"method": "task_arithmetic", "parameters": {"lambda": "much"}}, "is not a number: 'much'"),
]  # fmt: skip


@pytest.mark.parametrize("more, said", REFUSED)
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(place, tmp_path, more, said):
    path = write(place, **dict(more))
    with pytest.raises(MergeError, match=said) as problem:
        call("merge", "--mergekit", path, "--output", tmp_path / "m")
    assert "\n" not in str(problem.value)
    assert list(tmp_path.iterdir()) == []


def test_models_with_several_densities_are_refused(place):
    path = write(place, "ties", own={"density": 0.2})
    values = yaml.safe_load(path.read_text())
    values["models"][1]["parameters"]["density"] = 0.4
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(MergeError, match=r"several values of 'density' \(0.2, 0.4\)"):
        read_mergekit(path)


@pytest.mark.parametrize("text", ["[1, 2]", "merge_method: [", ""])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(MergeError, match=r"cannot be read|is no mergekit configuration"):
        read_mergekit(path)
    with pytest.raises(MergeError, match="cannot be read"):
        read_mergekit(tmp_path / "gone.yaml")


def test_the_command_takes_a_file_or_adapters(place, tmp_path):
    path = write(place, "linear")
    with pytest.raises(MergeError, match="leave them out of the command"):
        call("merge", place / "a", "--mergekit", path, "--output", tmp_path / "m")
    with pytest.raises(MergeError, match="leave them out of the command"):
        call("merge", "--mergekit", path, "--method", "ties", "--output", tmp_path / "m")
    with pytest.raises(MergeError, match="nothing to merge"):
        call("merge", "--output", tmp_path / "m")

from __future__ import annotations

import copy
from importlib.resources import files

import pytest

from orthomerge.errors import OrthomergeError
from orthomerge.experiment import load_recipe, parse_recipe

GOOD = {
    "name": "x",
    "base": "minilm",
    "tasks": ["subjectivity", "topic"],
    "arms": {"default": {"start": "default"}, "osrm": {"start": "min_eigen"}},
    "merges": [{"method": "ties", "options": {"density": 0.3}}],
}


def changed(path, value):
    values = copy.deepcopy(GOOD)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def test_the_recipes_that_come_along_are_valid():
    packaged = [p.name for p in files("orthomerge.recipes").iterdir() if p.name.endswith(".yaml")]
    assert len(packaged) > 5
    for name in ("recipes/demo.yaml", *packaged):
        recipe, text = load_recipe(name)
        assert recipe.name in text
    demo = load_recipe("demo.yaml")[0]
    assert [demo.arms[a].constraint for a in demo.arms] == ["init", "init", "project"]
    offline = load_recipe("offline8.yaml")[0]
    assert len(offline.tasks) == 8
    assert len(offline.seeds_of("osrm-frozen")) == 3
    assert len({tuple(offline.learning_rates_of(a)) for a in offline.arms}) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (changed(["taks"], []), ["'taks'", "did you mean 'tasks'"]),
        (changed(["arms", "osrm", "stat"], "x"), ["'stat'", "did you mean 'start'", "arms.osrm"]),
        (changed(["merges", 0, "method"], "tise"), ["'tise'", "did you mean 'ties'"]),
        (changed(["merges", 0, "options"], {"densty": 1}), ["densty", "did you mean 'density'"]),
        (
            changed(["merges", 0], {"method": "pico", "options": {"inner": "ties", "densty": 1}}),
            ["densty", "'ties'", "did you mean 'density'"],
        ),
        (changed(["arms", "osrm", "start"], "min_eign"), ["did you mean 'min_eigen'"]),
        (changed(["arms", "osrm", "constraint"], "frozen"), ["valid: init, freeze"]),
        (changed(["arms", "osrm", "granularity"], "tokn"), ["did you mean 'token'"]),
        (changed(["arms", "osrm", "options"], {"balance": 1}), ["balance"]),
        (changed(["tasks"], ["subjectivity", "topc"]), ["did you mean 'topic'"]),
        (changed(["tasks"], ["topic", "topic"]), ["named twice"]),
        (changed(["data"], {"train": 0}), ["data.train", "greater than 0"]),
        (changed(["training"], {"learning_rate": [1e-3, -1]}), ["learning_rate"]),
        (changed(["name"], "../up"), ["'name'"]),
        ({k: v for k, v in GOOD.items() if k != "base"}, ["no 'base'"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(values, words):
    with pytest.raises(OrthomergeError) as caught:
        parse_recipe(values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_files_that_are_not_recipes_are_said(tmp_path):
    with pytest.raises(OrthomergeError, match=r"that come along: .*demo\.yaml"):
        load_recipe(tmp_path / "no.yaml")
    for content, word in (("a: [", "as YAML: line 1"), ("- 1", "not a mapping")):
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(OrthomergeError, match=word):
            load_recipe(tmp_path / "r.yaml")


def test_options_of_an_inner_method_reach_the_merge():
    options = {"inner": "ties", "density": 0.5}
    recipe = parse_recipe(
        changed(["merges", 0], {"method": "core_space", "options": options, "rank": 3})
    )
    (merge,) = recipe.merges
    assert merge.config(0.4, run=2).to_dict() == {
        "method": "core_space", "weights": 0.4, "layer_weights": {}, "rank": 3, "seed": 2,
        "options": options, "heads": "keep", "base": None, "energy": None,
    }  # fmt: skip

"""The model card: its header, its Python, its figures and licences, read as a stranger reads it."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from conftest import call, tiny_bert, write_task
from peft_oracle import bert, llama, outputs, save_adapter
from safetensors.torch import load_file
from small_adapters import make_adapter

from orthomerge.adapters import (
    convert_adapters,
    merge_adapters,
    merge_to_model,
    verify,
)
from orthomerge.errors import AdapterError
from orthomerge.io.files import file_sha256
from orthomerge.records import CardScore, add_scores

HEADED = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def header(folder: Path) -> dict:
    return yaml.safe_load(card(folder).split("---")[1])


def carried_out(folder: Path, base: Path | None = None):
    """What the card's Python makes, its two places filled in."""
    (text,) = re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL)
    text = text.replace("path/to/this/folder", str(folder))
    if base is not None:
        text = text.replace(f"path/to/{base.name}", str(base))
    assert "path/to" not in text
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, str(folder / "README.md"), "exec"), found)
    return found["model"].eval()


def licensed(folder: Path, licence: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# a card\n")
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    bert().bert.save_pretrained(tmp_path / "base")
    return licensed(tmp_path / "base", "apache-2.0")


@pytest.fixture
def two(tmp_path, base) -> list[Path]:
    """Adapters of two and of three labels."""
    labelled = {"mood": bert, "topic": partial(tiny_bert, labels=3)}
    return [
        save_adapter(tmp_path / name, model, i, base_name=str(base), **HEADED)
        for i, (name, model) in enumerate(labelled.items())
    ]


# How to load it ----------------------------------------------------------------------------------


def test_a_merge_with_heads_is_loaded_with_the_head_the_card_names(two, base, tmp_path):
    merge_adapters(two, output=tmp_path / "out")
    model = carried_out(tmp_path / "out", base)
    head = load_file(tmp_path / "out" / "heads" / "mood.safetensors")["classifier.weight"]
    assert torch.equal(model.base_model.model.classifier.weight, head)
    assert "`heads/topic.safetensors` (3 labels)" in card(tmp_path / "out")
    whole = merge_to_model(two, tmp_path / "model", base=str(base))
    assert not whole
    full = carried_out(tmp_path / "model", base)
    torch.testing.assert_close(outputs(full), outputs(model), atol=1e-5, rtol=1e-4)


def test_an_averaged_head_and_a_decoder_are_loaded_as_the_card_says(base, tmp_path):
    one = [save_adapter(tmp_path / n, bert, i, base_name=str(base), **HEADED)
           for i, n in enumerate("ab")]  # fmt: skip
    merge_adapters(one, heads="average", output=tmp_path / "out")
    model = carried_out(tmp_path / "out", base)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    own = [load_file(f / "adapter_model.safetensors")["base_model.model.classifier.weight"]
           for f in one]  # fmt: skip
    torch.testing.assert_close(head.data, (own[0] + own[1]) / 2)

    llama().save_pretrained(tmp_path / "decoder")
    words = [
        save_adapter(tmp_path / n, llama, i, base_name=str(tmp_path / "decoder"),
                     target_modules=["q_proj"], task_type="CAUSAL_LM")
        for i, n in enumerate("cd")
    ]  # fmt: skip
    merge_adapters(words, output=tmp_path / "both")
    assert header(tmp_path / "both")["pipeline_tag"] == "text-generation"
    assert type(carried_out(tmp_path / "both", tmp_path / "decoder")).__name__ == (
        "PeftModelForCausalLM"
    )


def test_a_packaged_base_is_loaded_from_its_package(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "decoder")
    words = [
        save_adapter(tmp_path / n, llama, i, base_name="smollm2-135m", target_modules=["q_proj"],
                     task_type="CAUSAL_LM")
        for i, n in enumerate("ab")
    ]  # fmt: skip
    merge_adapters(words, output=tmp_path / "both")
    asked = []

    def resolve(name):
        asked.append(name)
        return SimpleNamespace(path_or_id=str(tmp_path / "decoder"))

    monkeypatch.setattr("orthomerge.models.resolve_model", resolve)
    assert type(carried_out(tmp_path / "both")).__name__ == "PeftModelForCausalLM"
    assert asked == ["smollm2-135m"]


def test_an_adapter_a_task_has_a_card_a_task(two, base, tmp_path):
    merge_adapters(two, method="emr", output=tmp_path / "out")
    said = card(tmp_path / "out")
    assert "`tasks/mood`" in said and "`tasks/topic`" in said
    by_folder = carried_out(tmp_path / "out", base)
    by_task = carried_out(tmp_path / "out" / "tasks" / "mood", base)
    assert torch.equal(outputs(by_folder), outputs(by_task))
    assert by_task.base_model.model.num_labels == 2
    assert carried_out(tmp_path / "out" / "tasks" / "topic", base).base_model.model.num_labels == 3


def test_the_card_is_written_as_the_hubs_own_program_writes_it(tmp_path):
    named = {"base_name": "org/base", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    folders = [save_adapter(tmp_path / n, llama, i, **named) for i, n in enumerate("ab")]
    for folder in folders:
        licensed(folder, "apache-2.0")
    merge_adapters(folders, output=tmp_path / "out")
    assert str(huggingface_hub.ModelCard(card(tmp_path / "out"))) == card(tmp_path / "out")
    assert header(tmp_path / "out")["tags"] == ["lora", "merged", "orthomerge"]


def test_the_card_names_no_place_on_this_machine(two, tmp_path):
    merge_adapters(two, output=tmp_path / "out")
    assert str(tmp_path) not in card(tmp_path / "out")
    assert "base_model" not in header(tmp_path / "out")  # a folder is no model of the hub


def test_what_a_strangers_adapter_says_cannot_write_the_header(tmp_path):
    """Names become text: no key of the header, no row of a table, no Python."""
    evil = 'org/base"); import os #\nlicense: mit\n'
    folder = save_adapter(tmp_path / "a|b`c", bert, 0, base_name=evil, **HEADED)
    merge_adapters([folder], output=tmp_path / "out")
    said = card(tmp_path / "out")
    assert set(header(tmp_path / "out")) == {"library_name", "pipeline_tag", "tags"}
    assert "| `a b c` |" in said
    (text,) = re.findall(r"```python\n(.*?)```", said, re.DOTALL)
    assert "\nimport os" not in text
    compile(text, "card", "exec")


# Licences ----------------------------------------------------------------------------------------


def test_parts_of_one_licence_give_it_to_the_header(two, tmp_path):
    for folder in two:
        licensed(folder, "apache-2.0")
    merge_adapters(two, output=tmp_path / "out")
    assert header(tmp_path / "out")["license"] == "apache-2.0"
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["base_licence"]["id"] == "apache-2.0"
    assert [a["licence"]["id"] for a in record["adapters"]] == ["apache-2.0"] * 2


def test_licences_are_listed_as_the_parts_state_them_and_not_judged(two, tmp_path):
    licensed(two[0], "cc-by-nc-4.0")
    said = call("merge", *two, "--output", tmp_path / "out")
    assert "license" not in header(tmp_path / "out")
    assert "note: licences" not in said
    rows = card(tmp_path / "out").split("## Licences")[1]
    assert "| the base model | apache-2.0 | its card |" in rows
    assert "| `mood` | cc-by-nc-4.0 | its card |" in rows
    assert "| `topic` | not stated | – |" in rows


def test_a_merge_asks_no_network_for_anything(two, tmp_path, monkeypatch):
    """Though its base is a model of the hub that is not in the cache."""
    import socket

    import huggingface_hub

    def asked(*address, **more):
        raise AssertionError(f"asked {address}")

    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "some-org/some-model"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    merge_adapters(two, output=tmp_path / "out")
    assert header(tmp_path / "out")["base_model"] == "some-org/some-model"
    assert "| the base model | not stated | – |" in card(tmp_path / "out")


def test_a_converted_adapter_carries_its_licence_on(tiny_base, tmp_path):
    for seed, name in enumerate("ab"):
        licensed(make_adapter(tmp_path / name, tiny_base, seed), "mit")
        write_task(tmp_path / f"{name}.jsonl", 40, seed=seed)
        call("stats", tiny_base, "--data", tmp_path / f"{name}.jsonl", "--samples", 20,
             "--output", tmp_path / f"{name}.safetensors")  # fmt: skip
    statistics = [tmp_path / f"{n}.safetensors" for n in "ab"]
    convert_adapters(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "out", statistics=statistics, base=None
    )
    assert "| `a` | mit | its card |" in card(tmp_path / "out" / "a")
    carried_out(tmp_path / "out" / "a", tiny_base)


# Scores ------------------------------------------------------------------------------------------


def test_scores_stand_in_the_card_and_the_folder_stays_verified(two, base, tmp_path):
    merge_adapters(two, output=tmp_path / "out")
    assert "Not measured yet" in card(tmp_path / "out")
    first = CardScore(task="mood", metric="accuracy", value=0.5, n=300, majority=0.4)
    add_scores(tmp_path / "out", [first])
    better = CardScore(task="mood", metric="accuracy", value=0.875, n=300, alone=0.9, majority=0.4)
    other = CardScore(task="topic", metric="macro_f1", value=0.75, n=200)
    assert add_scores(tmp_path / "out", [better, other]) == [better, other]
    said = card(tmp_path / "out")
    assert "| mood | accuracy | **0.875** | 0.900 | 0.400 | 300 |" in said
    assert "| topic | macro_f1 | **0.750** | – | – | 200 |" in said
    checks = verify(tmp_path / "out", adapters=two, redo=True)
    assert all(check.good for check in checks), checks
    licensed(base, "mit")  # what the base states now is no matter of what was written then
    assert all(check.good for check in verify(tmp_path / "out", adapters=two, redo=True))


def test_scores_do_not_make_an_altered_folder_good(two, tmp_path):
    merge_adapters(two, output=tmp_path / "out")
    with (tmp_path / "out" / "heads" / "mood.safetensors").open("ab") as file:
        file.write(b"\0")
    score = CardScore(task="mood", metric="accuracy", value=0.5, n=300)
    add_scores(tmp_path / "out", [score])
    states = {c.name: c.state for c in verify(tmp_path / "out", adapters=two)}
    assert states["heads/mood.safetensors"] == "altered" and states["README.md"] == "same"
    record = tmp_path / "out" / "merge.json"
    record.write_text(record.read_text().replace('"linear"', '"ties"'))
    with pytest.raises(AdapterError, match=r"merge\.json' was altered"):
        add_scores(tmp_path / "out", [score])


def test_what_eval_measures_comes_into_the_card(tiny_base, tmp_path):
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, tiny_base, seed)
    write_task(tmp_path / "a.jsonl", 300)
    call("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out")
    how = ["--task", tmp_path / "a.jsonl", "--rows", 40, "--json"]
    said = json.loads(call("eval", tmp_path / "out", *how, "--card"))
    line = f"| a | {said['metric']} | **{said['metrics'][said['metric']]:.3f}** | – |"
    assert line in card(tmp_path / "out")
    before = file_sha256(tmp_path / "out" / "README.md")
    (tmp_path / "said.json").write_text(json.dumps({**said, "task": "again"}))
    told = call("card", tmp_path / "out", "--results", tmp_path / "said.json")
    assert "figures of a, again" in told and "| again |" in card(tmp_path / "out")
    assert file_sha256(tmp_path / "out" / "README.md") != before
    (tmp_path / "said.json").write_text('{"task": 3}')
    with pytest.raises(AdapterError, match="not what 'orthomerge eval --json' prints"):
        from orthomerge.records import read_scores

        read_scores([tmp_path / "said.json"])

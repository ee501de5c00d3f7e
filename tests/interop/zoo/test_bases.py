"""Adapters that name no base, another base, or another revision of it."""

from __future__ import annotations

import json

import pytest
from odd_adapters import configured, llama, refusal, saved
from typer.testing import CliRunner

from orthomerge.adapters import merge_adapters, merge_to_model
from orthomerge.cli import app
from orthomerge.diagnostics import diagnose


@pytest.fixture
def made(tmp_path):
    def make(name, base, revision=None):
        folder = saved(tmp_path / name, llama, len(name), base=base, target_modules=["q_proj"])
        return configured(folder, base_model_name_or_path=base, revision=revision)

    return make


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("first", [None, ""])
def test_different_bases_behind_one_that_names_none(tmp_path, made, first):
    a, b, c = made("a", first), made("bb", "org/x"), made("ccc", "org/y")
    said = refusal("merge", a, b, c, "-o", tmp_path / "out")
    assert all(word in said for word in (str(b), "'org/x'", str(c), "'org/y'", "--base"))
    merge_adapters([a, b, c], weights=1.0, base="org/x", output=tmp_path / "out")
    assert settings(tmp_path / "out")["base_model_name_or_path"] == "org/x"


def test_a_diagnosis_of_adapters_that_call_one_base_by_two_names(made):
    b, c = made("bb", "org/x"), made("ccc", "org/y")
    said = refusal("diagnose", b, c)
    assert all(word in said for word in (str(b), "'org/x'", str(c), "'org/y'", "--base"))
    assert diagnose([b, c], base="org/x").overlap.names == ["bb", "ccc"]
    done = CliRunner().invoke(app, ["diagnose", str(b), str(c), "--base", "org/x", "--json"])
    assert done.exit_code == 0, done.output


def test_the_base_and_its_revision_are_kept(tmp_path, made):
    a, b, c = made("a", None), made("bb", "org/x"), made("ccc", "org/x", "v2")
    merge_adapters([a, b, c], weights=1.0, output=tmp_path / "out")
    found = settings(tmp_path / "out")
    assert (found["base_model_name_or_path"], found["revision"]) == ("org/x", "v2")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["base_model"] == "org/x"


def test_two_revisions_of_one_base(tmp_path, made):
    a, b = made("a", "org/x", "v1"), made("bb", "org/x", "v2")
    said = refusal("merge", a, b, "-o", tmp_path / "out")
    assert all(word in said for word in (str(a), "'v1'", str(b), "'v2'", "--base"))
    merge_adapters([a, b], weights=1.0, base="org/x", output=tmp_path / "out")


def test_a_full_model_is_of_the_revision_that_the_adapters_name(tmp_path, made, monkeypatch):
    asked = []

    def fake(name, **options):
        asked.append((name, options["revision"]))
        return str(tmp_path / "base")

    llama().save_pretrained(tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    a, b = made("a", "org/x", "v1"), made("bb", "org/x", None)
    merge_to_model([b, a], tmp_path / "out", weights=1.0)
    assert ("org/x", "v1") in asked

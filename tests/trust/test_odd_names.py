"""Names that can be no path: one sentence where the user wrote them, no folder where a file did."""

from __future__ import annotations

import pytest
from conftest import call

from orthomerge.errors import OrthomergeError
from orthomerge.io.files import is_folder, local
from orthomerge.records.licences import NOT_STATED, licence_of

VERBS = [("merge", "{}", "{}"), ("convert", "{}"), ("eval", "{}", "--task", "{}.csv")]
ODD = {"long": "x" * 300, "nobody's": "~nobody-has-this-name/adapter", "null": "a\0b"}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_what_can_be_no_path_is_no_folder_and_states_no_licence(name):
    assert not is_folder(name)
    assert licence_of(name) == NOT_STATED


@pytest.mark.parametrize(
    "verb", [("merge", "{}", "{}"), ("convert", "{}"), ("eval", "{}", "--task", "{}.csv")]
)
@pytest.mark.parametrize("name", list(ODD.values())[:2], ids=list(ODD)[:2])
def test_a_user_who_writes_one_is_told_in_a_sentence(name, verb, tmp_path):
    arguments = [part.format(name) for part in verb]
    more = [] if verb[0] == "eval" else ["-o", tmp_path / "out"]
    with pytest.raises(OrthomergeError, match=r"cannot be looked for|the home of nobody"):
        call(*arguments, *more)
    assert not (tmp_path / "out").exists()


def test_a_path_is_what_was_written_and_a_tilde_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("~/adapters/a") == tmp_path / "adapters" / "a"
    assert is_folder(tmp_path) and not is_folder(tmp_path / "nothing")

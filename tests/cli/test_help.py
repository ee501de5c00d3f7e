"""What a newcomer meets: few verbs, an example first, the usual options before the others."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from orthomerge.cli import app
from orthomerge.cli._help import OLD_VERBS, USUAL, VERBS


def verb(words: str):
    group = get_command(app)
    found = group.get_command(None, words.split()[0])
    for word in words.split()[1:]:
        found = found.commands[word]
    return found


def test_the_help_lists_the_verbs_to_learn_and_no_old_ones():
    group = get_command(app)
    visible = [name for name in group.list_commands(None) if not group.commands[name].hidden]
    assert visible == [name for name in VERBS if name in visible]
    assert not set(visible) & set(OLD_VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_a_verbs_help_has_its_example_right_after_its_first_sentence(name):
    paragraphs = verb(name).help.split("\n\n")
    assert "[bold]orthomerge " in " ".join(paragraphs[1:3]).replace("\n", " ")


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_options_come_before_the_others(name):
    found = verb(name)
    panels = {p.opts[0]: p.rich_help_panel for p in found.params if p.opts[0].startswith("-")}
    usual = [option for option, panel in panels.items() if panel is None]
    assert 3 <= len(usual) <= 12
    assert set(usual) <= set(USUAL[name].split())


def test_the_list_of_verbs_says_what_each_verb_says_of_itself():
    for name, what in VERBS.items():
        found = verb(name)
        assert what == (found.short_help or " ".join(found.help.split("\n\n")[0].split()))


@pytest.mark.parametrize("kind", ["methods", "solvers", "tasks", "models", "recipes"])
def test_list_names_what_there_is(kind):
    found = json.loads(CliRunner().invoke(app, ["list", kind, "--json"]).stdout)
    names = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert [row["name"] for row in found] == names[kind]
    shown = CliRunner().invoke(app, ["list", kind], env={"COLUMNS": "200"}).stdout
    assert names[kind][0] in shown


@pytest.mark.parametrize("old", ["methods", "solvers", "tasks"])
def test_an_old_verb_works_and_says_the_new_one(old):
    done = CliRunner().invoke(app, [old, "--json"])
    assert done.stdout == CliRunner().invoke(app, ["list", old, "--json"]).stdout
    assert f"'orthomerge list {old}'" in done.stderr

"""The reference of the command line, written from what `--help` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from typer.main import get_command

from orthomerge.cli import app

_MARKUP = re.compile(r"\[/?(?:bold|italic|dim|red|green|cyan)?\]")


def commands_page() -> str:
    """Every verb: what it does, its example, its arguments and options with their defaults."""
    parts = ["# Commands", "Written from `orthomerge VERB --help` when the site is built."]
    parts += [f"## orthomerge {name}\n\n{_body(name, verb)}" for name, verb in verbs()]
    return "\n\n".join(parts) + "\n"


def verbs() -> Iterator[tuple[str, Any]]:
    """Every verb by its whole name, in the order of `--help`, those of groups after their group."""
    group: Any = get_command(app)
    for name in group.list_commands(None):
        verb = group.commands[name]
        yield name, verb
        for inner, command in getattr(verb, "commands", {}).items():
            yield f"{name} {inner}", command


def _body(name: str, verb: Any) -> str:
    parts = [_text(verb.help or "")]
    arguments = [p for p in verb.params if not p.opts[0].startswith("-")]
    options = [p for p in verb.params if p.opts[0].startswith("-") and p.name != "help"]
    if hasattr(verb, "commands"):
        return "\n\n".join(parts)
    shown = " ".join(p.name.upper() + ("..." if p.nargs < 0 else "") for p in arguments)
    parts.append(f"```text\northomerge {name} {shown} [OPTIONS]\n```".replace("  ", " "))
    if arguments or options:
        kinds = get_type_hints(verb.callback)
        rows = [_row(p, _kind(kinds[p.name])) for p in [*arguments, *options]]
        parts.append("\n".join(["| | what | default |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def _row(parameter: Any, kind: str) -> str:
    option = parameter.opts[0].startswith("-")
    names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.name.upper()]
    what = ", ".join(f"`{name}`" for name in names) + (f" {kind}" if option else "")
    if parameter.required:
        default = "needed"
    elif parameter.default in (None, False, [], ()):
        default = ""
    else:
        default = f"`{parameter.default}`"
    return f"| {what} | {_cell(parameter.help or '')} | {default} |"


def _kind(annotation: Any) -> str:
    """The value an option takes, in a word; flags take none."""
    words = {int: "whole number", float: "number", str: "text", Path: "path", bool: ""}
    inner = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is list:
        return f"{_kind(inner[0])}, repeat"
    return _kind(inner[0]) if inner else words[annotation]


def _text(help: str) -> str:
    """Rich's markup as Markdown's: what is bold is a command, and a command is code."""
    text = re.sub(r"\[bold\](orthomerge.*?)\[/\]", r"`\1`", help, flags=re.DOTALL)
    return _MARKUP.sub("", re.sub(r"`[^`]+`", lambda m: " ".join(m[0].split()), text))


def _cell(help: str) -> str:
    return _MARKUP.sub("", " ".join(help.split())).replace("|", "\\|").replace("<", "&lt;")

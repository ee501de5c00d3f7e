"""What `--help` shows first: the verbs in order, each verb's example, and its usual options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

VERBS = (
    "demo", "run", "stats", "init", "train", "merge", "distill", "tune", "eval", "diagnose",
    "convert", "convert-format", "resize", "report", "verify", "list",
)  # fmt: skip
"""The verbs of the main help, in the order in which a person meets them."""

OLD_VERBS = {
    "methods": "list methods",
    "solvers": "list solvers",
    "tasks": "list tasks",
    "plan": "run RECIPE --dry-run",
    "fisher": "stats fisher",
    "board": "report FOLDER --serve",
    "card": "eval --card",
}
"""Verbs of version 0.1, hidden for one release, each with the words that replace it."""

OLD_OPTIONS = {
    "--share": "--energy-fraction",
    "--room": "--subspace-dim",
    "--quiet-energy": "--low-energy",
}
"""Options of version 0.1, read for one release, each with its new name."""

USUAL = {
    "run": "--output --base --set --dry-run --jobs --executor --json --quiet",
    "stats collect": "--data --output --targets --samples --granularity --representation "
    "--max-length --form --json --quiet",
    "init": "--others --own --output --rank --alpha --solver --constraint --strength --paper "
    "--labels --json",
    "train": "--train-file --task --output --epochs --learning-rate --batch-size --max-length "
    "--constraint --overwrite --json",
    "merge": "--output --method --weights --option --rank --base --save-as --heads --overwrite "
    "--json",
    "distill": "--data --output --from --method --weights --rank --steps --learning-rate "
    "--samples --json",
    "tune": "--task --output --objective --method --option --trials --rows --base --overwrite "
    "--json",
    "eval": "--task --head --base --rows --test-file --form --max-length --harness --card --json",
    "diagnose": "--stats --method --weights --option --json --quiet",
    "convert": "--output --stats --others --subspace --refit --base --overwrite --json",
    "stats fisher": "--task --output --samples --base --max-length --form --json --quiet",
}
"""The options that most calls need, by verb; `--help` lists the others under "More"."""

HIDDEN = {
    "merge": "--task --trials --rows",  # of --tune validation, which 'tune' does
    "stats collect": "--rows --size --noise-seed --batch-size",
    "stats publish": "--noise-seed",
    "stats fisher": "--batch-size",
    "convert": "--ridge --layers",
    "tune": "--init --batch-size --data-seed",
}
"""Options that no help shows: another verb has them, or hardly anyone changes them."""

_EXAMPLE = re.compile(r"Examples?:|\[bold\]orthomerge ")


def arrange(name: str, command: Any) -> None:
    """Make the help of a verb: options from "Args:" of its docstring, the example near the top.

    Rare options stand under "More".
    """
    text, _, described = (command.help or "").partition("\nArgs:\n")
    if text:
        command.help = _example_first(text)
    said = dict(_described(described))
    for parameter in command.params:
        parameter.help = said.get(parameter.name, parameter.help)
    hidden, usual = HIDDEN.get(name, "").split(), USUAL.get(name, "").split()
    for parameter in command.params:
        parameter.hidden = parameter.hidden or not {*parameter.opts}.isdisjoint(hidden)
        rare = {*parameter.opts}.isdisjoint([*usual, "--help"])
        if usual and rare and parameter.opts[0].startswith("-"):
            parameter.rich_help_panel = "More"


def _described(text: str) -> Iterator[tuple[str, str]]:
    """The names of parameters and what is said of them, from the lines of a docstring."""
    for part in re.split(r"\n(?=    \w)", text.strip("\n")):
        name, _, said = part.partition(": ")
        yield name.strip(), " ".join(said.split())


def _example_first(text: str) -> str:
    """The paragraphs of a help text: the first, then the examples, then what else there is."""
    first, *rest = re.split(r"\n\s*\n", text.strip())
    examples = [part for part in rest if _EXAMPLE.search(part)]
    others = [part for part in rest if not _EXAMPLE.search(part)]
    return "\n\n".join([first, *examples, *others])

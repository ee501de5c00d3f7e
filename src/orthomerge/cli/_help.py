"""What `--help` shows first: the verbs in order, each verb's example, and its usual options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

VERBS = {
    "demo": "Train and merge adapters of four real tasks in a few minutes, and show what merging "
    "cost.",
    "run": "Carry out a recipe: statistics, starts, training, merging, scores and a page.",
    "stats": "Second moments of layer inputs over a small sample: collect, inspect, merge.",
    "init": "Start an adapter that does not disturb other tasks, from their statistics.",
    "train": "Train an adapter from its start on one task; a classifier's head is kept beside it.",
    "merge": "Merge LoRA adapters of one base model into one adapter, straight from their factors.",
    "distill": "Merge adapters and train the result, without labels, to answer as each of them "
    "does alone.",
    "tune": "Find the weights of a merge on data, and merge with them; called again, go on.",
    "eval": "Score an adapter or a model on a task's test rows.",
    "diagnose": "Will these adapters work together? Find out before merging.",
    "convert": "Convert adapters that exist already, so that they disturb each other less in a "
    "merge.",
    "convert-format": "Write an adapter of Stable Diffusion, SDXL or Flux in another program's "
    "form.",
    "resize": "Make an adapter smaller: the closest one of a lower rank, its head and all else "
    "kept.",
    "share": "Put many adapters into one basis per layer, with coordinates per task.",
    "extract": "Make a LoRA adapter of a fully fine-tuned model, so that it can be merged with "
    "adapters.",
    "report": "Build a run's page from its result rows alone, compare runs, or follow them "
    "(--serve).",
    "verify": "Is an output what was written, from what it says it is from? Exit status 1 if it is "
    "not.",
    "list": "List what can be named: merging methods, solvers, tasks, packaged models, recipes.",
}
"""The verbs of the main help, in the order in which a person meets them, and what each does."""

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

_FILES = {
    "demo": "run", "convert-format": "convert_format", "eval": "evaluate", "list": "listing",
    "stats": "fisher stats_files",
    **dict.fromkeys(OLD_VERBS, "old"), "fisher": "fisher",
}  # fmt: skip


class Commands(MutableMapping[str, Any]):
    """All verbs by name; the file of a verb is imported when the verb is asked for.

    `built` makes commands of what the files imported so far have registered.
    """

    def __init__(self, made: Mapping[str, Any], built: Callable[[], Any]) -> None:
        self.made, self._built = dict(made), built
        for name, command in made.items():
            arrange(name, command)
            for inner, below in getattr(command, "commands", {}).items():
                arrange(f"{name} {inner}", below)

    def __getitem__(self, name: str) -> Any:
        if name not in self.made and name in self:
            for file in _FILES.get(name, name).split():
                import_module(f"orthomerge.cli.{file}")
            self.made = {**self._built().commands.made, **self.made}
        return self.made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> Mapping[str, Any]:
        return {**VERBS, **OLD_VERBS, **self.made}

    def __setitem__(self, name: str, command: Any) -> None:
        self.made[name] = command

    def __delitem__(self, name: str) -> None:
        del self.made[name]


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

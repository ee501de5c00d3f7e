"""The application object and what every verb shares: errors in a sentence, progress, output."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import typer
from rich.console import Console

from orthomerge.errors import OrthomergeError, RecipeError

app = typer.Typer(
    name="orthomerge",
    help="Make LoRA adapters mergeable: orthogonal starts before training, exact merging after.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command line: exit status 2 and one sentence for the user's mistakes, 1 for ours."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except OrthomergeError as problem:
        err.print(f"[bold red]error:[/] {_escaped(problem)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped; call the same command again to go on where it was.")
        sys.exit(130)


def _escaped(problem: Exception) -> str:
    from rich.markup import escape

    return escape(str(problem))


def print_json(value: Any) -> None:
    """Machine-readable output, nothing else on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` options; a value is a number, true/false or a word.

    Raises:
        RecipeError: no equals sign.
    """
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"option '{pair}' is not key=value, as in --option density=0.2.")
        options[key] = yaml.safe_load(value)
    return options


def parse_numbers(text: str | None, what: str) -> list[float] | None:
    """Numbers with commas between them.

    Raises:
        RecipeError: something that is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as problem:
        raise RecipeError(f"{what} '{text}' are not numbers with commas, as in 1,1,0.5.") from (
            problem
        )


def split_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]

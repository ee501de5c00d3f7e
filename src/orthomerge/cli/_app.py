"""The application object and what every verb shares: errors in a sentence, progress, output."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from orthomerge.cli._help import OLD_OPTIONS, OLD_VERBS, VERBS, Commands
from orthomerge.errors import (
    OrthomergeError,
    OrthomergeWarning,
    RecipeError,
    TrainingStopped,
)


def _say_new_name(old: str, new: str) -> None:
    text = f"note: '{old}' is now '{new}'; the old name goes in the next release."
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def _new_option(word: str) -> str:
    name, equals, value = word.partition("=")
    return OLD_OPTIONS[name] + equals + value


class _Verbs(TyperGroup):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = Commands(self.commands, lambda: get_group(app))
        self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order in which a person meets them, then the old ones."""
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of verbs, without importing any of them."""
        self._listing = True
        super().format_help(ctx, formatter)
        self._listing = False

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        old = [word for word in rest if word.partition("=")[0] in OLD_OPTIONS]
        if not ctx.resilient_parsing:
            if name in OLD_VERBS:
                _say_new_name(f"orthomerge {name}", f"orthomerge {OLD_VERBS[name]}")
            for option in {word.partition("=")[0] for word in old}:
                _say_new_name(option, OLD_OPTIONS[option])
        return name, command, [_new_option(word) if word in old else word for word in rest]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._listing:
            hidden = cmd_name not in VERBS
            return TyperCommand(cmd_name, help=VERBS.get(cmd_name), hidden=hidden)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="orthomerge",
    cls=_Verbs,
    help="Make LoRA adapters mergeable: orthogonal initialization before training, exact merging "
    "after it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"orthomerge {version('orthomerge')}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Options of the command itself; typer shows the help given above instead of this."""
    _print_notes()


class _Notes(logging.Handler):
    """What the library says on the way: plain lines beside standard output.

    `--quiet` leaves out what is only progress.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from orthomerge.cli._progress import bars

        place = err if record.levelno >= logging.WARNING else bars
        place.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def _print_notes() -> None:
    log = logging.getLogger("orthomerge")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())
        log.setLevel(logging.INFO)


_python_shows = warnings.showwarning


def _show_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours in a line, as errors are; what libraries warn of as Python shows it."""
    if issubclass(category, OrthomergeWarning):
        err.print(f"[bold yellow]warning:[/] {_escaped(message)}", highlight=False, soft_wrap=True)
    else:
        _python_shows(message, category, *where, **more)


_GO_ON = ("run", "demo", "train", "tune")
"""The verbs that keep what they have done when they are stopped."""


class _Stopped(BaseException):
    """A signal asked the command to end; what it was writing is cleared away on the way out."""


def main() -> None:
    """Run the command line: exit status 2 and one sentence for the user's mistakes, 1 for ours."""
    # Imports make objects that stay: looked through every 700, as by default, torch takes a tenth
    # longer to import.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    _end_tidily()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    if int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _be_quiet()
    try:
        app()
    except OrthomergeError as problem:
        err.print(f"[bold red]error:[/] {_escaped(problem)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except _Stopped as signalled:
        goes_on = any(verb in sys.argv[1:2] for verb in _GO_ON)
        way = "call the same command again to go on where it was" if goes_on else "nothing is kept"
        err.print(f"stopped; {way}.")
        sys.exit(128 + signalled.args[0])


def _end_tidily() -> None:
    """Ctrl-C, and what a scheduler sends before it kills, end the command like an error does."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        raise _Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


@contextmanager
def stopping_between(wanted: bool) -> Generator[Callable[[], bool] | None, None, None]:
    """Within the block a first signal is noted and a second one ends the command.

    For work that can stop between two steps and raises `TrainingStopped` then. Where it is not
    `wanted` nothing changes, and there is nothing to ask.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield None
        return
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise _Stopped(number)
        noted.append(number)
        err.print("stopping after this step; a second signal stops at once.")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    except TrainingStopped as problem:
        raise _Stopped(noted[0] if noted else signal.SIGINT) from problem
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _be_quiet() -> None:
    """In a job of several processes only the first one speaks, unless another one breaks."""

    def broke(kind: Any, problem: Any, trace: Any) -> None:
        traceback.print_exception(kind, problem, trace, file=sys.__stderr__)

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  (until the end)
    sys.excepthook = broke


def _escaped(problem: Any) -> str:
    from rich.markup import escape

    return escape(str(problem))


def table(
    *columns: str, title: str | None = None, caption: str | None = None, numbers: bool = True
) -> Table:
    """A table of words, or of `numbers` by name: all columns but the first to the right."""
    found = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left")
    found.caption_justify = "left"
    for place, column in enumerate(columns):
        found.add_column(column, justify="right" if numbers and place else "left", overflow="fold")
    return found


def print_json(value: Any) -> None:
    """Machine-readable output, nothing else on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_options(pairs: list[str], example: str = "--option density=0.2") -> dict[str, Any]:
    """`key=value` options; a value is a number, true/false or a word.

    Raises:
        RecipeError: no equals sign, or a value that is no YAML.
    """
    from orthomerge.io.documents import Unreadable, parse_yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"option '{pair}' is not key=value, as in {example}.")
        try:
            options[key] = _number_or(parse_yaml(value))
        except Unreadable as problem:
            raise RecipeError(f"option '{key}' cannot be read: {problem}.") from problem
    return options


def _number_or(value: Any) -> Any:
    """YAML takes 1e-3 for a word; nobody means one by it."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


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

"""The few errors a user can meet: each message is one sentence naming the thing and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OrthomergeError(Exception):
    """A mistake the user can mend. The command line prints it in one sentence and exits with 2."""


class OrthomergeWarning(UserWarning):
    """Something that can be meant as it is, but often is not: the command line prints it once."""


class UnknownNameError(OrthomergeError):
    """A name that is not registered: a method, a solver, a task, a key of a recipe."""


class AssetError(OrthomergeError):
    """A model or a data set could not be found or is not what it should be."""


class RecipeError(OrthomergeError):
    """A recipe that does not say something that can be run."""


class TaskError(OrthomergeError):
    """A task whose rows cannot be trained or scored on."""


class StatisticsError(OrthomergeError):
    """A statistics file that cannot be read, or that belongs to another model or target set."""


class AdapterError(OrthomergeError):
    """An adapter that cannot be read, or that does not fit the model or the other adapters."""


class OutputError(AdapterError):
    """An output that may not be written where it is named (until v0.1 an `AdapterError`)."""


class TrainingError(OrthomergeError):
    """A training that cannot be done or gone on with as it was asked for."""


class TrainingStopped(TrainingError):
    """A training that ended early because it was asked to; it resumes when it is called again."""


class SubspaceError(OrthomergeError):
    """A subspace that does not exist, as a rank larger than the admissible dimensions."""


class MergeError(OrthomergeError):
    """A merge that is not defined: shapes that differ, weights that do not match, a bad option."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return found[0] if found else None


def reason(problem: BaseException) -> str:
    """The first line of what an exception says, without its full stop; else its type."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0].rstrip(". ")


def unknown_name(
    kind: str,
    name: str,
    valid: Iterable[str],
    *,
    where: str = "",
    error: type[OrthomergeError] = UnknownNameError,
) -> OrthomergeError:
    """The error for an unknown `name`: it lists the valid ones and names the nearest."""
    names = list(valid)
    close = nearest(name, names)
    hint = f"did you mean '{close}'? " if close else ""
    place = f" in {where}" if where else ""
    return error(f"unknown {kind} '{name}'{place}: {hint}valid: {', '.join(names) or '(none)'}.")

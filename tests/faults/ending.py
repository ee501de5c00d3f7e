"""How a call ends, as the command line would tell it."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from orthomerge.cli import _app
from orthomerge.errors import OrthomergeError


def ending_of(call: Callable[[], str]) -> tuple[int, str]:
    """The exit status of a call, and what it or its error says."""
    try:
        _app._end_tidily()
        return 0, call()
    except OrthomergeError as problem:
        return 2, str(problem)
    except _app._Stopped as problem:
        return 128 + problem.args[0], ""
    except BaseException:
        return 1, traceback.format_exc()

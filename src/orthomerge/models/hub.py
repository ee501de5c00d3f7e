"""What the hub has left on this machine, and what its answers mean, in a clause for a person.

The hub's client is imported where it is needed: it takes half a second.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from orthomerge.errors import reason

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"


def cached_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Where the hub's cache has a file of a repository; None where it does not.

    Raises:
        ValueError: the name is no repository's.
    """
    from huggingface_hub import constants

    # As the client names its folders: most of what is asked for here was never fetched.
    if not (Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_reason(problem: BaseException, kind: str = "model") -> str:
    """Why the hub did not give a `kind` ("model", "adapter", "data set"), without a full stop.

    The clients raise errors of their own, their transport's and the disk's, often one as the cause
    of another: the first known one of the chain is reported, else what the last one says.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    for cause in _chain(problem):
        if isinstance(cause, GatedRepoError):
            return (
                f"the {kind} is gated: accept its terms on its page at the hub, then {LOG_IN}, or "
                "name a folder with a copy of it"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return f"the hub has no such {kind}, or it is private: check the name, or {LOG_IN}"
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return (
                f"no room left on the disk for the {kind}: free some, or set HF_HOME to a folder "
                "on another disk"
            )
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            if constants.HF_HUB_OFFLINE:
                return (
                    f"HF_HUB_OFFLINE is set, so the hub is not asked, and no copy of the {kind} is "
                    "kept here: unset it, or name a folder with a copy"
                )
            return (
                f"the hub does not answer: check the connection and try again, or name a folder "
                f"with a copy of the {kind}"
            )
    return f"the hub said: {reason(problem)}"


def _chain(problem: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = problem
    while current is not None and current not in seen:
        yield current
        seen.append(current)
        current = current.__cause__ or current.__context__

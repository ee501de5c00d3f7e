"""The licence that a model or an adapter states: in its card or its configuration.

Nothing is fetched: a licence that cannot be read on this machine is not stated.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.io.documents import (
    YAML_BYTES,
    Unreadable,
    is_array,
    is_object,
    parse_yaml,
    read_json,
    read_text,
)
from orthomerge.io.files import is_folder, local
from orthomerge.io.names import CARD
from orthomerge.models.hub import cached_file
from orthomerge.models.packaged import carrying

_CONFIGS = ("config.json", "adapter_config.json")
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


class Licence(NamedTuple):
    """What a part says of its licence: the hub's identifier, None where it says none, and where.

    `name` is what stands beside the identifier "other".
    """

    id: str | None
    where: str
    name: str | None = None

    @property
    def said(self) -> str:
        """In words, for a table."""
        return "not stated" if self.id is None else self.name or self.id


NOT_STATED = Licence(None, "")


def licence_in(folder: Path) -> Licence:
    """The licence that a local folder states, in the header of its card or its configuration."""
    for licence in (_of_card(folder / CARD), *(_of_config(folder / name) for name in _CONFIGS)):
        if licence is not None:
            return licence
    unread = next((name for name in _FILES if (folder / name).is_file()), None)
    return Licence(None, f"its file {unread} says which" if unread else "")


def licence_of(named: str | None) -> Licence:
    """The licence of a model by its folder or id: in the folder, its package, the hub's cache."""
    if not named:
        return NOT_STATED
    if is_folder(named):
        return licence_in(local(named))
    if record := carrying(named):
        return Licence(
            record.licence.split()[0].lower(), f"package {record.package} {record.version}"
        )
    repository, _, revision = named.partition("@")
    try:
        found = cached_file(repository, CARD, revision or None)
    except (ValueError, OSError):  # no id of the hub
        return NOT_STATED
    return (_of_card(found) if found else None) or NOT_STATED


def _of_card(file: Path) -> Licence | None:
    """What the YAML header of a card says, if it is one."""
    if not file.is_file():
        return None
    try:
        card = read_text(file, YAML_BYTES)
        header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
        data = parse_yaml(header[1]) if header else None
    except (Unreadable, OSError):
        return None
    return _stated(data, "its card")


def _of_config(file: Path) -> Licence | None:
    if not file.is_file():
        return None
    try:
        data = read_json(file)
    except (Unreadable, OSError):
        return None
    return _stated(data, file.name)


def _stated(data: Any, where: str) -> Licence | None:
    """The licence among a header's keys; anything that is no plain name is "other"."""
    if not is_object(data) or not data.get("license"):
        return None
    listed: list[Any] = data["license"] if is_array(data["license"]) else [data["license"]]
    names = [str(item).strip() for item in listed]
    name = names[0].lower()
    if len(names) != 1 or not _ID.fullmatch(name):
        return Licence("other", where, plain(" and ".join(names)))
    if name in ("unknown", "other"):
        called: object = data.get("license_name")
        return Licence("other", where, plain(str(called)) if called else None)
    return Licence(name, where)


def plain(text: str, most: int = 80) -> str:
    """A stranger's text as one line of a page, without signs of Markdown or HTML."""
    line = " ".join(re.sub(r"[`|<>\[\]\\]", " ", text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."

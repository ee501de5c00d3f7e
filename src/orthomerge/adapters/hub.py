"""Where an adapter is: a folder, or a repository of the hub, of which no pickles are got."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from orthomerge.errors import AdapterError
from orthomerge.io.files import local
from orthomerge.models.hub import hub_reason

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""The files of a tokenizer."""
FILES = ["README.md", "adapter_config.json", "*.safetensors", *TOKENIZER]
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$", re.ASCII)


class Located(NamedTuple):
    """An adapter's folder, its short name, and where it is from (a path, or a hub id@commit)."""

    folder: Path
    name: str
    source: str


def on_disk(named: str | Path) -> bool:
    """Whether a folder was named, be it there or not; else an id of the hub."""
    by_place = str(named).startswith((".", "~", "/"))
    return by_place or local(named).exists() or _HUB_ID.match(str(named)) is None


def locate_adapter(named: str | Path) -> Located:
    """The folder of that name, else the hub's snapshot of `org/name` or `org/name@revision`.

    Raises:
        AdapterError: neither of the two; the message says what the hub answered.
    """
    folder, match = local(named), _HUB_ID.match(str(named))
    if match is None or on_disk(named):
        return Located(folder, folder.resolve().name, str(named))
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        found = Path(
            snapshot_download(
                match["id"],
                revision=match["revision"],
                allow_patterns=FILES,
                ignore_patterns=["*/*"],
            )
        )
    # The client raises its transport's errors, its own and ValueErrors for odd ids: all of them
    # mean that the hub did not give the adapter.
    except Exception as problem:
        raise AdapterError(
            f"no adapter '{named}': there is no folder of that name, and "
            f"{hub_reason(problem, 'adapter')}."
        ) from problem
    return Located(found, match["id"].split("/")[1], f"{match['id']}@{found.name}")

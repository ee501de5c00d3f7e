"""The record of a folder: a JSON file with a hash of every file in it and of itself.

Hashes show that a file was altered. They are no signature: whoever alters a file can write its
record anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, is_object, parse_json, read_json
from orthomerge.io.files import file_sha256, fingerprint, known_sha256, write_json
from orthomerge.io.names import IN_HEADER, RECORDS
from orthomerge.io.tensors import read_metadata


def seal(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the record of a finished folder, with hashes of all its files and of itself."""
    files = {key: _sha256(folder / key) for key in files_below(folder) if key != name}
    content = json.loads(json.dumps({**record, "files": files}))
    write_sealed(folder / name, content)


def _sha256(path: Path) -> str:
    """A file's hash; weights are hashed when they are written, and not once more."""
    return known_sha256(path) if path.suffix == ".safetensors" else file_sha256(path)


def write_sealed(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the hash of all else that it says."""
    content = unsealed(record)
    write_json(file, {**content, "sha256": fingerprint(content)})


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its hash: what the hash is of."""
    return {key: value for key, value in record.items() if key != "sha256"}


def seal_again(record: Mapping[str, Any], folder: Path, name: str, **more: Any) -> None:
    """Write the record of what `folder` was made from for the folder, with `more` said in it."""
    kept = {key: value for key, value in record.items() if key not in ("files", "sha256")}
    seal(folder, name, {**kept, **more})


def files_below(folder: Path) -> Iterator[str]:
    """The files of a folder and its folders by their relative names, but for hidden ones."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield inside.as_posix()


def written_record(output: Path) -> dict[str, Any]:
    """What the record of an output says that was just written: of a folder, or in a file's header.

    Raises:
        AdapterError: there is none that can be read.
    """
    if output.is_file():
        return parse_json(read_metadata(output)[IN_HEADER])
    return read_record(output)[1]


def read_record(folder: Path) -> tuple[str, dict[str, Any], bool]:
    """A folder's record: its file's name, what it says, and whether its own hash is right.

    Raises:
        AdapterError: no record, none that can be read, one of before files were hashed, or one
            that names files outside the folder.
    """
    name = next((n for n in RECORDS if (folder / n).is_file()), None)
    if name is None:
        raise AdapterError(
            f"'{folder}' has none of {', '.join(RECORDS)}: name what 'orthomerge merge', "
            "'convert', 'init' or 'train' wrote."
        )
    record = record_of(folder, name)
    files = record.get("files")
    if not is_object(files):
        raise AdapterError(
            f"'{folder / name}' holds no hashes of the folder's files: it was altered, or written "
            "by an older version; make the folder again."
        )
    for key in files:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
            raise AdapterError(
                f"'{folder / name}' names the file '{key[:80]}', which is not inside the folder: "
                "it was altered."
            )
    return name, record, record.get("sha256") == fingerprint(unsealed(record))


def record_of(folder: Path, name: str) -> dict[str, Any]:
    """What a record says, whether or not it was altered.

    Raises:
        AdapterError: it cannot be read, or is no record.
    """
    try:
        record = read_json(folder / name)
    except (Unreadable, OSError) as problem:
        raise AdapterError(
            f"'{folder / name}' cannot be read ({problem}): it was altered."
        ) from problem
    if not is_object(record):
        raise AdapterError(f"'{folder / name}' is no record of what went in: it was altered.")
    return record

"""Where an output may be written: apart from every input, and over nothing but our own work.

Call one of these before the work begins; `atomic_path` looks once more when it puts a folder in
its place. An output of orthomerge is known by its record (`RECORDS`) or by its metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError, OutputError
from orthomerge.io.documents import Unreadable, is_array, is_object, read_json
from orthomerge.io.files import fingerprint, local
from orthomerge.io.names import CARD, CONFIG, CONVERT, RECORDS, TRAINING, WEIGHTS

# What a training of version 0.1 wrote: its record held no hashes.
_TRAINED = (TRAINING, CONFIG, WEIGHTS, CARD)
# A temporary folder of ours that a killed process left (`disk.Holder`).
_LEFT_BEHIND = re.compile(r"\..+\.part-\w+")


def require_free(
    output: str | Path,
    *,
    inputs: Iterable[Any] = (),
    base: Any = None,
    overwrite: bool = False,
    kind: str | None = None,
) -> None:
    """Refuse a folder that cannot be written whole, before anything is done for it.

    Args:
        output: the folder.
        inputs: what is read: paths, or objects with a `path`. What is not on this machine (an id
            of the hub, something in memory) is passed by.
        base: the base model, as it is named.
        overwrite: whether a folder that orthomerge wrote may be replaced.
        kind: the record of folders that are replaced without `overwrite`, as a start by a start.

    Raises:
        OutputError: it contains an input or is inside one, is a file, is not empty though nothing
            may be replaced, or holds a file that orthomerge did not write.
    """
    output = Path(output)
    require_apart(output, inputs, base)
    if output.is_dir():
        record = next((name for name in RECORDS if (output / name).is_file()), "")
        if not overwrite and record != kind and any(output.iterdir()):
            way = ", or replace what orthomerge wrote there with --overwrite (overwrite=True)"
            raise OutputError(
                f"the output folder '{output}' is not empty: choose another{'' if kind else way}."
            )
        require_ours(output)
    elif output.exists():
        raise OutputError(f"the output '{output}' is a file: name a folder.")


def require_free_file(
    output: str | Path,
    ours: Callable[[Path], bool],
    *,
    inputs: Iterable[Any] = (),
    base: Any = None,
) -> None:
    """Refuse a file that cannot be written; a file of the same kind is replaced.

    `ours` says whether a file is of that kind; the others are as in `require_free`.

    Raises:
        OutputError: it is an input or is inside one, is a folder, or is a file of another kind.
    """
    output = Path(output)
    require_apart(output, inputs, base)
    if output.is_dir():
        raise OutputError(f"the output '{output}' is a folder: name a file.")
    if output.exists() and not ours(output):
        raise OutputError(
            f"the output '{output}' is there already and is no file of this kind that orthomerge "
            "wrote, so it is not replaced: choose another, or remove it yourself."
        )


def require_resumable(
    output: str | Path,
    marks: Collection[str],
    what: str,
    *,
    first: Collection[str] = (),
    inputs: Iterable[Any] = (),
    base: Any = None,
) -> None:
    """Refuse a folder that is neither free nor one of a run or study, which goes on in it.

    `marks` are the files of which one at least is in such a folder, `first` what is written before
    them, and `what` is its name in errors.

    Raises:
        OutputError: it contains an input or is inside one, is a file, or holds something else.
    """
    output = Path(output)
    require_apart(output, inputs, base)
    if output.exists() and not output.is_dir():
        raise OutputError(f"the output '{output}' is a file: name a folder.")
    if not output.is_dir() or any((output / mark).is_file() for mark in marks):
        return
    there = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    if there and not set(there) <= set(first):
        raise OutputError(
            f"the output folder '{output}' is not empty ('{there[0]}') and holds no {what}: choose "
            "another."
        )


def require_apart(output: str | Path, inputs: Iterable[Any] = (), base: Any = None) -> None:
    """Refuse an output that is an input or the base model, contains one, or is inside one.

    Links and `..` are followed.

    Raises:
        OutputError: one of the three.
    """
    output = Path(output)
    for what, named in [("input", item) for item in inputs] + [("base model", base)]:
        path = _path_of(named)
        if path is None:
            continue
        if _same(output, path):
            raise OutputError(f"the output '{output}' is the {what} '{path}': choose another.")
        link = path.parent.resolve() / path.name  # which is lost with a folder around it, too
        if any(_lies_in(place, output) for place in (path.resolve(), link)):
            raise OutputError(
                f"the output '{output}' contains the {what} '{path}': choose a place apart from it."
            )
        if _lies_in(output.resolve(), path):
            raise OutputError(
                f"the output '{output}' is inside the {what} '{path}': choose a place outside it."
            )


def require_ours(folder: Path) -> None:
    """Refuse to replace a folder that holds anything that orthomerge did not write there.

    Raises:
        OutputError: it has no record, or holds a file that no record names.
    """
    there = list(_items(folder))
    if not there:
        return
    known = _known(folder)
    if known is None:
        raise OutputError(
            f"the output folder '{folder}' holds '{there[0]}' and no record of orthomerge "
            f"({', '.join(RECORDS)}), so it is not replaced: choose another, or remove it yourself."
        )
    for name in there:
        if name not in known:
            raise OutputError(
                f"the output folder '{folder}' holds '{name}', which orthomerge did not write, so "
                "it is not replaced: choose another, or move that file away."
            )


def is_page(file: Path) -> bool:
    """Whether a file is a report of ours."""
    with file.open("rb") as stream:
        start = stream.read(2**20)
    return start.lstrip().startswith(b"<!doctype html>") and b"orthomerge" in start


def _path_of(named: Any) -> Path | None:
    """Where an input is on this machine; None where it is in memory or elsewhere."""
    path = named if isinstance(named, str | Path) else getattr(named, "path", None)
    if path is None or not str(path):
        return None
    try:
        path = local(path)
    except OrthomergeError:
        return None
    return path if path.exists() else None


def _same(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    return one.exists() and other.exists() and one.samefile(other)


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another or is below it, by whatever names."""
    return any(_same(place, outer) for place in (inner, *inner.parents))


def _items(folder: Path) -> Iterator[str]:
    """Everything below a folder but its folders, by relative name; links are items."""
    for at, folders, files in os.walk(folder):
        place = Path(at).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _LEFT_BEHIND.fullmatch(name))
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        yield from ((place / name).as_posix() for name in sorted([*files, *links]))


def _known(folder: Path) -> set[str] | None:
    """The files that the records of a folder name; None where it has no record."""
    found: set[str] = set()
    for name in RECORDS:
        if (folder / name).is_file():
            found |= _named_by(folder, name)
    if found:
        return found
    # Several conversions share a folder, each in one of its own.
    below = [path for path in folder.iterdir() if (path / CONVERT).is_file()]
    return {f"{path.name}/{name}" for path in below for name in _named_by(path, CONVERT)} or None


def _named_by(folder: Path, name: str) -> set[str]:
    """The files that one record names, itself included; none where it is not one of ours."""
    try:
        record = read_json(folder / name)
    except (Unreadable, OSError):
        return set()
    if not is_object(record):
        return set()
    files, content = record.get("files"), {k: v for k, v in record.items() if k != "sha256"}
    if is_object(files):
        return {name, *files} if record.get("sha256") == fingerprint(content) else set()
    losses = record.get("losses")
    old = name == TRAINING and is_array(losses) and all(is_array(pair) for pair in losses)
    return set(_TRAINED) if old else set()

"""Is an output what was written, and from what it says: files, inputs, and a second merge."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from orthomerge.adapters.card import cards
from orthomerge.adapters.files import WEIGHTS, Adapter, read_adapter
from orthomerge.adapters.merge import merge_adapters, merge_to_model
from orthomerge.adapters.provenance import MERGE, files_below, read_record
from orthomerge.adapters.settings import CONFIG
from orthomerge.documents import Unreadable, is_array, is_object, read_json
from orthomerge.errors import AdapterError, OrthomergeError, StatisticsError
from orthomerge.features import Statistics
from orthomerge.features.statistics import ENTRY as STATISTICS
from orthomerge.files import file_sha256, fingerprint
from orthomerge.fisher import ENTRY as FISHER
from orthomerge.fisher import load_fisher

SAME, ALTERED, MISSING, EXTRA, AWAY = "same", "altered", "missing", "extra", "not here"


# What values of other types come to where they are used.
_TYPES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)


class Check(NamedTuple):
    """One thing that was looked at: a "file" of the output, an "input", or a file of the "redo".

    `state` is "same", "altered", "missing", "extra" (a file that no record names) or "not here"
    (an input that does not lie on this machine, which is no fault).
    """

    what: str
    name: str
    state: str
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in (SAME, AWAY)


def verify(
    path: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    redo: bool = False,
    base: str | None = None,
) -> list[Check]:
    """Hold a merge, a converted adapter, a statistics or a Fisher file to the hashes it carries.

    Every file of a folder must have the hash that its record gives it, and no other file may lie
    there (hidden ones are passed by). Inputs are looked for where the record says, or at
    `adapters`, in the order they were merged in; nothing is fetched. `redo` merges them again and
    compares the files bit for bit.

    Args:
        path: what `merge`, `convert`, `stats` or `fisher` wrote.
        adapters: where the input adapters lie now.
        redo: merge again into a temporary folder beside the output.
        base: the base model for that, where the adapters call it by another name.

    Raises:
        AdapterError: no output with a record there, or inputs that a second merge needs and that
            are not here.
        StatisticsError: a file that is neither statistics nor Fisher information.
    """
    path = Path(path)
    if path.is_file():
        if redo or adapters:
            raise AdapterError(f"'{path}' is no merge: leave out the adapters and the redo.")
        return [_sealed(path)]
    name, record, whole = read_record(path)
    checks = [Check("file", name, SAME if whole else ALTERED)]
    checks += _files(path, name, record["files"])
    found = _entries(record, path / name)
    if adapters and len(adapters) != len(found):
        raise AdapterError(
            f"{len(adapters)} adapters for an output of {len(found)}: name each, in their order."
        )
    places = [Path(a) for a in adapters] or [_place(e.get("path"), path) for e in found]
    checks += [_input(entry, place) for entry, place in zip(found, places, strict=True)]
    checks += [_source(entry, path) for entry in _statistics(record)]
    if redo:
        if name != MERGE:
            raise AdapterError(f"'{path}' is a conversion: only merges are done again.")
        checks += _redo(path, record, found, places, base)
    return checks


def _sealed(path: Path) -> Check:
    """A statistics or Fisher file, every entry read and held to its hash."""
    try:
        with cast(Any, safe_open(path, framework="pt")) as stream:
            kinds: set[str] = set(stream.metadata() or {})
    except (SafetensorError, OSError) as problem:
        return Check("file", path.name, ALTERED, str(problem).splitlines()[0])
    try:
        if FISHER in kinds:
            deque(load_fisher(path).values(), maxlen=0)
        else:
            Statistics.load(path)
    except StatisticsError as problem:
        if not kinds & {FISHER, STATISTICS}:
            raise
        return Check("file", path.name, ALTERED, str(problem))
    return Check("file", path.name, SAME)


def _files(folder: Path, record: str, hashes: dict[str, Any]) -> list[Check]:
    checks: list[Check] = []
    for name, written in hashes.items():
        if not (folder / name).is_file():
            checks.append(Check("file", name, MISSING))
        else:
            same = file_sha256(folder / name) == written
            checks.append(Check("file", name, SAME if same else ALTERED))
    there = [n for n in files_below(folder) if n not in hashes and n != record]
    return checks + [Check("file", n, EXTRA, "no record names it") for n in there]


def _entries(record: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """What the record says of each input adapter."""
    found = record.get("adapters", [record.get("adapter")])
    if not is_array(found) or not found or not all(is_object(e) for e in found):
        raise AdapterError(f"'{file}' does not say which adapters went in: it was altered.")
    return found


def _statistics(record: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[Any] = [record.get("statistics"), record.get("fisher")]
    groups += list(groups[0].values()) if is_object(groups[0]) else []
    listed = [entry for group in groups if is_array(group) for entry in group]
    return [entry for entry in listed if is_object(entry) and entry.get("sha256")]


def _place(named: Any, output: Path) -> Path | None:
    """Where an input lies: as it was called, from here or from beside the output."""
    if not isinstance(named, str) or not named or "\0" in named:
        return None
    try:
        return next((p for p in (Path(named), output.parent / named) if p.exists()), None)
    except OSError:  # a name longer than names can be
        return None


def _input(entry: dict[str, Any], place: Path | None) -> Check:
    called = str(entry.get("path") or entry.get("name"))
    if place is None or not (place / WEIGHTS).is_file():
        return Check("input", called, AWAY, "name it with --adapter")
    if file_sha256(place / WEIGHTS) != entry.get("sha256"):
        return Check("input", called, ALTERED, f"other weights in '{place}'")
    if "config_sha256" in entry and _config(place) != entry["config_sha256"]:
        return Check("input", called, ALTERED, f"another {CONFIG} in '{place}'")
    return Check("input", called, SAME)


def _config(place: Path) -> str | None:
    try:
        return fingerprint(read_json(place / CONFIG))
    except (Unreadable, OSError):
        return None


def _source(entry: dict[str, Any], output: Path) -> Check:
    place = _place(entry.get("path"), output)
    if place is None or not place.is_file():
        return Check("input", str(entry.get("path")), AWAY)
    same = file_sha256(place) == entry["sha256"]
    return Check("input", str(place), SAME if same else ALTERED)


def _redo(
    folder: Path,
    record: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    places: Sequence[Path | None],
    base: str | None,
) -> list[Check]:
    """The same merge once more, its files beside those recorded."""
    read = [_named(e, p) for e, p in zip(entries, places, strict=True)]
    try:
        how: dict[str, Any] = {
            "method": record["method"],
            "weights": [float(e["weight"]) for e in entries],
            "layer_weights": record["layer_weights"],
            "rank": record["rank"],
            "seed": int(record["seed"]),
            "heads": record["heads"],
            "base": base or record.get("base"),
            "statistics": _again(record, "statistics", folder),
            "fisher": _again(record, "fisher", folder),
            **record["options"],
        }
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.part-", dir=folder.parent) as at:
            target = Path(at) / folder.name
            if record["form"] == "model":
                merge_to_model(read, target, max_shard_size=record["max_shard_size"], **how)
            else:
                merge_adapters(read, output=target, **how)
            again = read_record(target)[1]
            made = again["files"] | _cards(again, record)
    except _TYPES as problem:
        raise AdapterError(
            f"'{folder / MERGE}' does not say how to merge again ({problem}): it was altered, or "
            "the output's folder cannot be written beside."
        ) from problem
    written = record["files"]
    return [
        Check("redo", name, SAME if made.get(name) == written.get(name) else ALTERED)
        for name in sorted({*made, *written})
    ]


def _cards(again: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    """The hashes of the cards, were what came from elsewhere (licences, figures) as recorded."""
    licences = [entry.get("licence") for entry in record["adapters"]]
    told = {
        **again,
        "base_licence": record.get("base_licence"),
        "figures": record.get("figures"),
        "adapters": [
            {**entry, "licence": licence}
            for entry, licence in zip(again["adapters"], licences, strict=True)
        ],
    }
    return {name: sha256(text.encode()).hexdigest() for name, text in cards(told).items()}


def _named(entry: dict[str, Any], place: Path | None) -> Adapter:
    if place is None:
        raise AdapterError(
            f"the adapter '{entry.get('path')}' is not here, so it cannot be merged again: name "
            "each with --adapter (adapters=...), in their order."
        )
    return replace(read_adapter(place), name=str(entry.get("name")), source=str(entry.get("path")))


def _again(record: dict[str, Any], what: str, output: Path) -> list[Path] | None:
    """The files a method needed beside the adapters."""
    found: list[dict[str, Any]] = record.get(what) or []
    places = [_place(entry.get("path"), output) for entry in found]
    if None in places:
        raise OrthomergeError(
            f"the merge took {what} that the record names no file of, or that are not here: it "
            "cannot be done again."
        )
    return [p for p in places if p is not None] or None

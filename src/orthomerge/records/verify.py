"""Files and inputs of an output held to the hashes that it carries."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.fisher import ENTRY as FISHER
from orthomerge.fisher import load_fisher
from orthomerge.io.documents import Unreadable, is_array, is_object, read_json
from orthomerge.io.files import file_sha256, fingerprint
from orthomerge.io.names import CONFIG, EXTRACT, START, TRAINING, WEIGHTS
from orthomerge.records.file import files_below, read_record
from orthomerge.records.inputs import base_here, entries_of, place_of
from orthomerge.statistics import Statistics
from orthomerge.statistics.file import ENTRY as STATISTICS

SAME, ALTERED, MISSING, EXTRA, AWAY = "same", "altered", "missing", "extra", "not here"


class Check(NamedTuple):
    """One thing that was looked at: a "file" of the output, an "input", or a file of the "redo".

    `state` is "same", "altered", "missing", "extra" (a file that no record names) or "not here"
    (an input that does not lie on this machine, which is no fault). The base is an input too.
    """

    what: str
    name: str
    state: str
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in (SAME, AWAY)


class Recorded(NamedTuple):
    """A folder's record, and where the adapters that went in are on this machine.

    `name` is the record's file, `whole` whether its own hash is right, `entries` what it says of
    the adapters, `places` their folders (None where one is not here).
    """

    folder: Path
    name: str
    record: dict[str, Any]
    whole: bool
    entries: list[dict[str, Any]]
    places: list[Path | None]

    @classmethod
    def of(cls, folder: Path, adapters: Sequence[str | Path] = ()) -> Recorded:
        """The record of a folder; `adapters` are where its inputs are now, in their order.

        Raises:
            AdapterError: no record there that can be read, or another number of adapters.
        """
        name, record, whole = read_record(folder)
        entries = _entries(record, folder, name)
        if adapters and len(adapters) != len(entries):
            raise AdapterError(
                f"{len(adapters)} adapters for an output of {len(entries)}: name each, in their "
                "order."
            )
        places = [Path(a) for a in adapters] or [place_of(e.get("path"), folder) for e in entries]
        return cls(folder, name, record, whole, entries, list(places))


def check(
    path: str | Path, *, adapters: Sequence[str | Path] = (), base: str | None = None
) -> list[Check]:
    """Hold a folder of ours, a statistics or a Fisher file to the hashes it carries.

    `orthomerge.verify` does so, and can make the output once more.

    Raises:
        AdapterError: no output with a record there, or adapters that are not its.
        StatisticsError: a file that is neither statistics nor Fisher information.
    """
    path = Path(path)
    if path.is_file():
        if adapters:
            raise AdapterError(f"'{path}' is no merge: leave out the adapters.")
        return [_sealed(path)]
    found = Recorded.of(path, adapters)
    checks = [Check("file", found.name, SAME if found.whole else ALTERED)]
    checks += _files(path, found.name, found.record["files"])
    checks += [_input(e, place) for e, place in zip(found.entries, found.places, strict=True)]
    checks += [_source(entry, path) for entry in _statistics(found.record)]
    return checks + _base(found.record, path, base)


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


def _entries(record: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    """What the record says of each input adapter; a start or a training may have none."""
    alone = name in (START, TRAINING, EXTRACT)  # may be made from no adapter
    found = record.get("adapters", []) if alone else entries_of(record)
    some = is_array(found) and (found or alone)
    if not is_array(found) or not some or not all(is_object(e) for e in found):
        raise AdapterError(
            f"'{folder / name}' does not say which adapters went in: it was altered."
        )
    return found


def _statistics(record: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[Any] = [record.get("statistics"), record.get("fisher")]
    groups += list(groups[0].values()) if is_object(groups[0]) else []
    listed = [entry for group in groups if is_array(group) for entry in group]
    return [entry for entry in listed if is_object(entry) and entry.get("sha256")]


def _input(entry: dict[str, Any], place: Path | None) -> Check:
    called = str(entry.get("path") or entry.get("name"))
    file = place if place is None or place.is_file() else place / WEIGHTS
    if file is None or not file.is_file():
        return Check("input", called, AWAY, "name it with --adapter")
    if file_sha256(file) != entry.get("sha256"):
        return Check("input", called, ALTERED, f"other weights in '{place}'")
    folder = file.parent
    if file != place and "config_sha256" in entry and _config(folder) != entry["config_sha256"]:
        return Check("input", called, ALTERED, f"another {CONFIG} in '{folder}'")
    return Check("input", called, SAME)


def _base(record: dict[str, Any], output: Path, named: str | None) -> list[Check]:
    """The base model, as it is named or as the record names it; nothing where it holds no hash."""
    written, said = record.get("base_sha256"), record.get("base") or record.get("base_model")
    if not isinstance(written, str):
        return []
    called, found = named or str(said), base_here(record, output, named)
    if found is None:
        return [Check("input", called, AWAY, "the base model, not checked: name it with --base")]
    same = found.sha256 == written
    note = "the base model" if same else f"the base model, another in '{found.path_or_id}'"
    return [Check("input", called, SAME if same else ALTERED, note)]


def _config(place: Path) -> str | None:
    try:
        return fingerprint(read_json(place / CONFIG))
    except (Unreadable, OSError):
        return None


def _source(entry: dict[str, Any], output: Path) -> Check:
    place = place_of(entry.get("path"), output)
    if place is None or not place.is_file():
        return Check("input", str(entry.get("path")), AWAY)
    same = file_sha256(place) == entry["sha256"]
    return Check("input", str(place), SAME if same else ALTERED)

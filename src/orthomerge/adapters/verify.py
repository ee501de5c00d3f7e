"""Is an output what was written, and from what it says: files, inputs, and made once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from orthomerge.adapters.files import WEIGHTS
from orthomerge.adapters.provenance import base_here, entries_of, files_below, place_of, read_record
from orthomerge.adapters.redo import made_again
from orthomerge.adapters.settings import CONFIG
from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.fisher import ENTRY as FISHER
from orthomerge.fisher import load_fisher
from orthomerge.io.documents import Unreadable, is_array, is_object, read_json
from orthomerge.io.files import file_sha256, fingerprint
from orthomerge.io.outputs import START, TRAINING
from orthomerge.models.assets import nothing_fetched
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


def verify(
    path: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    redo: bool = False,
    base: str | None = None,
) -> list[Check]:
    """Hold a folder of ours, a statistics or a Fisher file to the hashes it carries.

    Every file of a folder must have the hash that its record gives it, and no other file may lie
    there (hidden ones are passed by). Inputs, and the base where the record holds its hash, are
    looked for where the record says, or at `adapters`, in the order they were merged in; nothing is
    fetched. `redo` merges or converts them again and compares the files bit for bit.

    Args:
        path: what `merge`, `convert`, `init`, `train`, `stats` or `fisher` wrote.
        adapters: where the input adapters lie now.
        redo: merge or convert again, into a temporary folder beside the output.
        base: the base model, where it lies elsewhere than the record says.

    Raises:
        AdapterError: no output with a record there, one that is not done again (a start, a
            conversion that was trained after it), or inputs that this needs and that are not here.
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
    found = _entries(record, path, name)
    if adapters and len(adapters) != len(found):
        raise AdapterError(
            f"{len(adapters)} adapters for an output of {len(found)}: name each, in their order."
        )
    places = [Path(a) for a in adapters] or [place_of(e.get("path"), path) for e in found]
    checks += [_input(entry, place) for entry, place in zip(found, places, strict=True)]
    checks += [_source(entry, path) for entry in _statistics(record)]
    checks += _base(record, path, base)
    if redo:
        with nothing_fetched():
            made = made_again(path, name, record, found, places, base)
        written = record["files"]
        checks += [
            Check("redo", file, SAME if made.get(file) == written.get(file) else ALTERED)
            for file in sorted({*made, *written})
        ]
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


def _entries(record: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    """What the record says of each input adapter; a start or a training may have none."""
    alone = name in (START, TRAINING)  # may be made from no adapter
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
    if place is None or not (place / WEIGHTS).is_file():
        return Check("input", called, AWAY, "name it with --adapter")
    if file_sha256(place / WEIGHTS) != entry.get("sha256"):
        return Check("input", called, ALTERED, f"other weights in '{place}'")
    if "config_sha256" in entry and _config(place) != entry["config_sha256"]:
        return Check("input", called, ALTERED, f"another {CONFIG} in '{place}'")
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

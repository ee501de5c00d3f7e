"""`verify`, and an output made once more from what its record says."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthomerge.adapters.config import ConvertConfig
from orthomerge.adapters.convert import convert_adapters
from orthomerge.adapters.diffusion_names import find_diffusion_file
from orthomerge.adapters.files import Adapter, read_adapter
from orthomerge.adapters.merge import merge_adapters, merge_to_model
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.io.names import CARD, CONVERT, MERGE, SHARE, START
from orthomerge.merging import FULL, MergeConfig
from orthomerge.models.assets import nothing_fetched
from orthomerge.records import Check, Recorded, check, read_record
from orthomerge.records.inputs import base_here, place_of
from orthomerge.records.verify import ALTERED, SAME

# What values of other types come to where they are used.
_TYPES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)


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
    fetched. `redo` merges or converts them again and compares the files bit for bit, but for the
    cards, whose words may change with the version.

    Args:
        path: what `merge`, `convert`, `init`, `train`, `stats` or `fisher` wrote.
        adapters: where the input adapters are now.
        redo: merge or convert again, into a temporary folder beside the output.
        base: the base model, where it is elsewhere than the record says.

    Raises:
        AdapterError: no output with a record there, one that is not done again (a start, a
            conversion that was trained after it), or inputs that this needs and that are not here.
        StatisticsError: a file that is neither statistics nor Fisher information.
    """
    path = Path(path)
    if path.is_file() and find_diffusion_file(path):
        raise AdapterError(
            f"'{path}' is an adapter in one file, which holds no hash of itself: merge into a "
            "folder to have one that can be verified."
        )
    if redo and path.is_file():
        raise AdapterError(f"'{path}' is no merge: leave out the redo.")
    checks = check(path, adapters=adapters, base=base)
    if not redo:
        return checks
    found = Recorded.of(path, adapters)
    with nothing_fetched():
        made = _made_again(found, base)
    files = {**found.record["files"], **dict.fromkeys(made)}
    return checks + [
        Check("redo", name, SAME if made.get(name) == found.record["files"].get(name) else ALTERED)
        for name in sorted(files)
        if Path(name).name != CARD
    ]


def _made_again(found: Recorded, base: str | None) -> dict[str, str]:
    """The hashes of the files of a second merge or conversion, by name, but for its record's.

    Raises:
        AdapterError: a start, a conversion that was trained after it, a record that does not say
            how, or adapters that are not here.
        OrthomergeError: statistics or Fisher information that are not here.
    """
    folder, name, record = found.folder, found.name, found.record
    if name not in (MERGE, CONVERT):
        kind = {START: "a start", SHARE: "of adapters in one basis"}.get(name, "a training")
        raise AdapterError(f"'{folder}' is {kind}: only merges and conversions are done again.")
    if name == CONVERT:
        _require_untrained(folder, record)
    if "distilled" in record:
        raise AdapterError(
            f"'{folder}' was distilled on texts that its record does not hold, so it is not done "
            "again: leave out --redo (redo=True)."
        )
    base_now = base or recorded_base(record, folder)
    read = [named(e, p, base_now) for e, p in zip(found.entries, found.places, strict=True)]
    again = _convert if name == CONVERT else _merge
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.part-", dir=folder.parent) as at:
            return again(found, read, base_now, Path(at) / folder.name)
    except _TYPES as problem:
        verb = "convert" if name == CONVERT else "merge"
        raise AdapterError(
            f"'{folder / name}' does not say how to {verb} again ({problem}): it was altered, or "
            "the output's folder cannot be written beside."
        ) from problem


def _merge(
    found: Recorded, read: Sequence[Adapter], base: str | None, target: Path
) -> dict[str, str]:
    folder, record = found.folder, found.record
    config = config_of(record, found.entries, base)
    needed: dict[str, Any] = inputs_of(record, folder)
    if record["form"] == "model":
        again = "quantization_error" in record
        merge_to_model(
            read, target, config, max_shard_size=record["max_shard_size"], requantize=again,
            **needed,
        )  # fmt: skip
    else:
        merge_adapters(read, config, output=target, **needed)
    return read_record(target)[1]["files"]


def inputs_of(record: dict[str, Any], folder: Path) -> dict[str, list[Path] | None]:
    """The statistics and Fisher files that a merge was given; errors are those of a redo."""
    return {
        what: _again(record.get(what), called, folder) or None
        for what, called in (("statistics", "statistics"), ("fisher", "Fisher information"))
    }


def config_of(
    record: dict[str, Any], entries: Sequence[dict[str, Any]], base: str | None
) -> MergeConfig:
    """What was asked of a merge, as its record says it."""
    # A run's merges once held their rank among the options, too.
    options = {k: v for k, v in record["options"].items() if k != "rank" or record["rank"] is None}
    return MergeConfig(
        record["method"],
        [float(e["weight"]) for e in entries],
        record["layer_weights"],
        FULL if record["rank"] is None else record["rank"],  # nothing was cut
        int(record["seed"]),
        options,
        record["heads"],
        # An adapter's configuration calls the base what it was called then.
        base if record["form"] == "model" else record.get("base"),
        record.get("energy"),
    )


def _convert(
    found: Recorded, read: Sequence[Adapter], base: str | None, target: Path
) -> dict[str, str]:
    folder, record = found.folder, found.record
    (adapter,), sources = read, record["statistics"]
    if len(sources["own"]) > 1:
        raise AdapterError(
            f"'{folder / CONVERT}' does not say which statistics are the adapter's own: it was "
            "written by an older version; convert again."
        )
    convert_adapters(
        [adapter],
        target,
        statistics=_again(sources["own"], "statistics", folder),
        others=_again(sources["others"], "statistics", folder),
        config=ConvertConfig(**record["config"]),
        base=base,
    )
    return read_record(target)[1]["files"]


def _require_untrained(folder: Path, record: dict[str, Any]) -> None:
    # Before recoveries were recorded, the losses beside the weights were all that told of one.
    if "recovered" in record or (folder / "training.json").is_file():
        raise AdapterError(
            f"'{folder}' was trained after its conversion (--recover), which is not done again: "
            "leave out --redo (redo=True)."
        )


def recorded_base(record: dict[str, Any], output: Path) -> str | None:
    """The folder of the base that the record names, where it is here and the one it was."""
    found = base_here(record, output)
    written = record.get("base_sha256")
    return found.path_or_id if found and written in (None, found.sha256) else None


def named(entry: dict[str, Any], place: Path | None, base: str | None) -> Adapter:
    """An adapter that a record names, from where it is now.

    Raises:
        AdapterError: it is not here, or cannot be read.
    """
    if place is None:
        raise AdapterError(
            f"the adapter '{entry.get('path')}' is not here, so nothing can be made of it again: "
            "name each with --adapter (adapters=...), in their order."
        )
    read = read_adapter(place, base=base)
    return replace(read, name=str(entry.get("name")), source=str(entry.get("path")))


def _again(found: list[dict[str, Any]] | None, what: str, output: Path) -> list[Path]:
    """The files that were needed beside the adapters."""
    places = [place_of(entry.get("path"), output) for entry in found or []]
    if None in places:
        raise OrthomergeError(
            f"'{output}' was made with {what} that the record names no file of, or that are not "
            "here: it cannot be done again."
        )
    return [p for p in places if p is not None]

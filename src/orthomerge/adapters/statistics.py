"""What a method needs beside the adapters, held to belong to them: statistics and Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from orthomerge.adapters.files import Adapter
from orthomerge.errors import MergeError, StatisticsError
from orthomerge.fisher import load_fisher
from orthomerge.merging import MergeConfig
from orthomerge.models.assets import is_local, resolve_model
from orthomerge.moments import Moment
from orthomerge.statistics import Statistics


class Needed(NamedTuple):
    """What a method is given in addition to the adapters, one of each per adapter."""

    statistics: list[Statistics] | None = None
    fisher: list[Mapping[str, Tensor]] | None = None


def read_needed(
    config: MergeConfig,
    adapters: Sequence[Adapter],
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
) -> Needed:
    """What the method needs, read from its files a layer at a time and held to be of the adapters.

    Raises:
        StatisticsError: an unreadable file, statistics of another model or form, or Fisher
            information of another adapter.
        MergeError: something that the method does not look at, or not one per adapter.
    """
    return Needed(_statistics(config, statistics, adapters), _fisher(config, fisher, adapters))


def _statistics(
    config: MergeConfig,
    statistics: Sequence[str | Path | Statistics] | None,
    adapters: Sequence[Adapter],
) -> list[Statistics] | None:
    if not statistics:
        return None
    if "moments" not in config.needs:
        raise MergeError(
            f"the method '{config.method}' takes no statistics: leave them out, or choose one that "
            "needs moments ('orthomerge list methods')."
        )
    return of_one_model(statistics, adapters, config.base)


def beside_files(item: str | Path | Statistics) -> Statistics:
    """Statistics where adapters lie that are read from files: on the CPU, wherever collected.

    Raises:
        StatisticsError: an unreadable file.
    """
    found = Statistics.of(item)
    if found.path is not None:
        return found
    moments = {lead: m if _on_cpu(m) else m.to("cpu") for lead, m in found.moments.items()}
    return replace(found, moments=moments)


def _on_cpu(moment: Moment) -> bool:
    tensors, _ = moment.state()
    return all(tensor.device.type == "cpu" for tensor in tensors.values())


def of_one_model(
    statistics: Sequence[str | Path | Statistics],
    adapters: Sequence[Adapter],
    base: str | None = None,
) -> list[Statistics]:
    """The statistics, read an entry at a time, held to be of one model: of the base, if known.

    Raises:
        StatisticsError: an unreadable file, or statistics of another model or form.
    """
    read = [beside_files(s) for s in statistics]
    called = [
        f"'{s}'" if isinstance(s, str | Path) else f"statistics {i}"
        for i, s in enumerate(statistics, start=1)
    ]
    naming = next((a for a in adapters if a.base_model), adapters[0])
    for item, name in zip(read, called, strict=True):
        require_base(item, name, naming, base, first=read[0])
    return read


def require_base(
    item: Statistics, name: str, adapter: Adapter, base: str | None, *, first: Statistics
) -> str | None:
    """Refuse statistics of another model than the first ones', or than the adapter's base.

    The base counts where it is a folder or is named; else all must be of one model. All must be of
    one form, and that of prompts goes with language models alone. Returns the hash of the one
    model, where the base or the first statistics tell it.

    Raises:
        StatisticsError: statistics of another model or form.
    """
    named = base or adapter.base_model
    known, model = first.meta.model_sha256, first.meta.model_id
    if named and (base or is_local(named)):
        known, model = resolve_model(named).sha256, named
    if known:
        item.require_model(known, model, name=name)
    item.require_form(adapter.config.get("task_type"), name=name)
    if item.meta.form != first.meta.form:
        raise StatisticsError(
            f"{name} is of the form '{item.meta.form}', the first statistics of '{first.meta.form}'"
            ": collect them in one form (orthomerge stats --form)."
        )
    return known


def _fisher(
    config: MergeConfig,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None,
    adapters: Sequence[Adapter],
) -> list[Mapping[str, Tensor]] | None:
    if not fisher:
        return None
    if "fisher" not in config.needs:
        raise MergeError(
            f"the method '{config.method}' takes no Fisher information: leave it out, or "
            "choose one that needs it ('orthomerge list methods')."
        )
    if len(fisher) != len(adapters):
        raise MergeError(
            f"{len(fisher)} Fisher files for {len(adapters)} adapters: give one for each, in order."
        )
    return [
        _by_names_here(
            load_fisher(item, adapter_sha256=adapter.sha256)
            if isinstance(item, str | Path)
            else item,
            adapter,
        )
        for item, adapter in zip(fisher, adapters, strict=True)
    ]


def _by_names_here(fisher: Mapping[str, Tensor], adapter: Adapter) -> Mapping[str, Tensor]:
    """Fisher information under the names that the adapter's layers have here."""
    return _Renamed(fisher, adapter.renamed) if adapter.renamed else fisher


class _Renamed(Mapping[str, Tensor]):
    """A mapping under other names; a value is looked up when it is asked for."""

    def __init__(self, values: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        before = {old: new for new, old in names.items()}
        self._values, self._names = values, {before.get(name, name): name for name in values}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

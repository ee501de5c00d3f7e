"""The statistics of one task on one base model, and the file that carries them between teams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.io.names import STATISTICS
from orthomerge.io.sealed import SealedKind, digest
from orthomerge.moments import MeanMoment, Moment, RowMoment, SecondMoment, SketchMoment, combine
from orthomerge.statistics.meta import FORMAT, OLDER, StatisticsMeta
from orthomerge.statistics.publish import published

ENTRY = "orthomerge"
_FILE = SealedKind(ENTRY, FORMAT, STATISTICS, "statistics", OLDER)
SUFFIX = ".stats.safetensors"
is_statistics = _FILE.wrote
"""Whether a file is one of statistics, by its metadata."""
_KINDS: dict[str, type[Moment]] = {
    m.kind: m for m in (SecondMoment, RowMoment, SketchMoment, MeanMoment)
}
_META = TypeAdapter(StatisticsMeta)


@dataclass(frozen=True)
class Statistics:
    """Second moments by distinct layer input, and which layer reads which.

    `moments` is keyed by the first layer that reads an input; `layers` maps every target layer to
    that key.
    """

    moments: Mapping[str, Moment]
    layers: dict[str, str]
    meta: StatisticsMeta

    @classmethod
    def of(cls, item: Statistics | str | Path) -> Statistics:
        """The statistics, read an entry at a time where `item` is a file.

        Raises:
            StatisticsError: an unreadable file.
        """
        return item if isinstance(item, Statistics) else cls.load(item, lazy=True)

    @property
    def path(self) -> Path | None:
        """The file the entries are read from when they are asked for; None in memory."""
        return self.moments.path if isinstance(self.moments, _Entries) else None

    def moment(self, layer: str) -> Moment:
        """The moment of a layer's input, in whatever representation it is held.

        `layer` may carry the prefix of a model with a head (`bert.encoder...`): statistics are
        collected on, and name layers within, the part below it.

        Raises:
            StatisticsError: no statistics for that layer.
        """
        return self.moments[self.layers[self.name_of(layer)]]

    def name_of(self, layer: str) -> str:
        """What these statistics call a layer, which may carry the prefix of a model with a head.

        Raises:
            StatisticsError: no statistics for that layer.
        """
        if layer in self.layers:
            return layer
        for known in self.layers:
            if layer.endswith(f".{known}"):
                return known
        raise StatisticsError(
            f"no statistics for layer '{layer}': these cover "
            f"{', '.join(self.meta.target_modules)} of '{self.meta.model_id}'."
        )

    def second_moment(self, layer: str) -> Float[Tensor, "d_in d_in"]:
        """`S` at a layer's input, dense, float64.

        Raises:
            StatisticsError: no statistics for that layer.
        """
        return self.moment(layer).matrix

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics over both samples: what collecting over both at once would give.

        Exact for full moments, means, and rows that were all kept; sketches keep their bound.

        Raises:
            StatisticsError: another model, tokenizer, target set, granularity, form or prompt, or a
                published part.
        """
        other.require_match(self, mine="the second statistics", theirs="the first")
        return self._with(other, self.meta.samples + other.meta.samples, lambda a, b: a + b)

    def __sub__(self, other: Statistics) -> Statistics:
        """The statistics without a sample that is in them: exact for full moments and means.

        Raises:
            StatisticsError: a mismatch, another representation, more rows than there are, or a
                published part.
        """
        other.require_match(self, mine="the second statistics", theirs="the first")
        return self._with(other, self.meta.samples - other.meta.samples, lambda a, b: a - b)

    def published(self, directions: int, noise: float = 0.0, seed: int | None = None) -> Statistics:
        """The top `directions` of every input alone, blurred by Gaussian noise of size `noise`.

        What is done to each representation, and why it is no differential privacy, is said in
        `orthomerge.statistics.publish`. Noise comes from the operating system's secure source;
        `seed` makes it repeatable, for tests only.

        Raises:
            StatisticsError: statistics published already, fewer than one direction or more than
                an input is wide, or noise that is negative or not finite.
        """
        if self.meta.directions is not None:
            raise StatisticsError(
                f"these are the top {self.meta.directions} directions of something already: "
                "publish from the whole statistics."
            )
        moments = published(self.moments, directions, noise, seed)
        meta = replace(self.meta, directions=directions, noise=float(noise))
        return Statistics(moments, self.layers, meta)

    def _with(
        self, other: Statistics, samples: int, join: Callable[[Moment, Moment], Moment]
    ) -> Statistics:
        if self.meta.directions is not None or other.meta.directions is not None:
            raise StatisticsError(
                "a published part does not add up with other statistics: merge the whole ones, "
                "then publish."
            )
        if self.meta.prompt != other.meta.prompt:
            raise StatisticsError(
                "the two statistics were collected with different prompts: collect one of them "
                "again, or use them as those of two tasks."
            )
        if self.layers != other.layers:
            raise StatisticsError(
                "the two statistics do not cover the same layers: collect them with one --targets."
            )
        moments = {lead: join(m, other.moments[lead]) for lead, m in self.moments.items()}
        return Statistics(moments, self.layers, replace(self.meta, samples=samples))

    def save(self, path: str | Path, *, replace: bool = False) -> Path:
        """Write one `.safetensors` file: no text, no row as it was seen, only moments and metadata.

        Every entry carries the SHA-256 of its tensors, the metadata that of itself. Equal
        statistics give equal bytes: all metadata is one entry, since safetensors has no order
        among several. A file of statistics is replaced, any other only with `replace`. Of a full
        moment the upper triangle is written, in float64: its smallest eigenvalues, from which
        starts are made, lie below what float32 distinguishes.

        Raises:
            StatisticsError: an input of which no row was seen.
            OutputError: there is a file of another kind.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        entries: dict[str, Any] = {}
        for lead, moment in self.moments.items():
            held, values = moment.state()
            if "matrix" in held:
                held["triangle"] = packed(held.pop("matrix"))
            held = {name: t.detach().cpu().contiguous() for name, t in held.items()}
            tensors |= {f"{lead}:{name}": t for name, t in held.items()}
            entries[lead] = {"kind": moment.kind, **values, "sha256": digest(held)}
        content = {
            "format": self.meta.format,
            "meta": asdict(self.meta),
            "layers": self.layers,
            "entries": entries,
        }
        _FILE.save(path, tensors, content, replace=replace)
        return path

    @classmethod
    def load(cls, path: str | Path, *, lazy: bool = False) -> Statistics:
        """Read a statistics file; `lazy` reads each entry when it is asked for and keeps none.

        Raises:
            StatisticsError: no such file, not a statistics file, another format, or a file that
                was cut or altered (an entry read lazily is checked when it is read).
        """
        path = Path(path)
        STATISTICS.require(path)
        with _FILE.open(path) as stream:
            content = _FILE.metadata(path, stream)
            meta = replace(_META.validate_python(content["meta"]), format=FORMAT)
            layers = {str(k): str(v) for k, v in content["layers"].items()}
            entries = content["entries"]
            if set(layers.values()) != set(entries) or not entries:
                raise ValueError("its layers and its entries do not belong together")
            for lead, entry in entries.items():
                if entry["kind"] not in _KINDS:
                    raise ValueError(f"entry '{lead}' is of an unknown kind '{entry['kind']}'")
        moments = _Entries(path, entries)
        return cls(moments if lazy else dict(moments.items()), layers, meta)

    def require_model(self, sha256: str, model_id: str, *, name: str) -> None:
        """Refuse statistics of another model's weights.

        Raises:
            StatisticsError: the hash of the weights differs.
        """
        if self.meta.model_sha256 not in (None, sha256):
            raise StatisticsError(
                f"{name} was collected on '{self.meta.model_id}', whose weights are not those of "
                f"'{model_id}': collect it on this model."
            )

    def require_form(self, task_type: str | None, *, name: str) -> None:
        """Refuse statistics of prompts beside a classifier, which never reads one.

        Raises:
            StatisticsError: they are of prompts, and PEFT's `task_type` is a classifier's.
        """
        if self.meta.form == "text" and task_type in ("SEQ_CLS", "TOKEN_CLS"):
            raise StatisticsError(
                f"{name} was collected on prompts (--form text), but the adapter is a classifier's "
                f"({task_type}): collect it on the texts as they are, or make the adapter for a "
                "language model (--task-type CAUSAL_LM or SEQ_2_SEQ_LM)."
            )

    def require_match(self, other: Statistics, *, mine: str, theirs: str) -> None:
        """Refuse to use two statistics together that do not describe the same layers.

        Raises:
            StatisticsError: another model, revision, tokenizer, target set, granularity or form.
        """
        if (found := self.meta.difference(other.meta)) is not None:
            word, here, there = found
            forms = (
                " The form 'text' is of prompts and answers (orthomerge stats --form text), "
                "'classifier' of texts as they are."
            )
            raise StatisticsError(
                f"{mine} and {theirs} differ in their {word} ({here} and {there}): "
                "statistics can be combined only on equal terms; collect one of them again."
                f"{forms if word == 'form' else ''}"
            )


def packed(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " half"]:
    """The upper triangle of a symmetric matrix, row by row: d (d + 1) / 2 numbers."""
    return matrix[torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device).triu()]


def unpacked(triangle: Float[Tensor, " half"]) -> Float[Tensor, "d d"]:
    """The symmetric matrix with this upper triangle.

    Raises:
        ValueError: a number of numbers that no triangle has.
    """
    dim = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    if triangle.ndim != 1 or dim * (dim + 1) // 2 != triangle.numel():
        raise ValueError(f"{list(triangle.shape)} numbers are no triangle")
    upper = triangle.new_zeros(dim, dim)
    upper[torch.ones(dim, dim, dtype=torch.bool).triu()] = triangle
    return upper + upper.triu(1).T


class _Entries(Mapping[str, Moment]):
    """The moments of a file, each read and checked when it is asked for."""

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self._entries = entries

    def __getitem__(self, lead: str) -> Moment:
        entry = self._entries[lead]
        with _FILE.open(self.path) as stream:
            prefix = f"{lead}:"
            names = [n for n in stream.keys() if n.startswith(prefix)]  # noqa: SIM118
            held = {n.removeprefix(prefix): stream.get_tensor(n) for n in names}
            if digest(held) != entry["sha256"]:
                raise ValueError(f"entry '{lead}' is not what was written")
            if "triangle" in held:
                held["matrix"] = unpacked(held.pop("triangle"))
            try:
                return _KINDS[entry["kind"]].restore(held, entry)
            except StatisticsError as problem:
                raise StatisticsError(f"'{self.path}', entry '{lead}': {problem}") from problem

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def merge_statistics(statistics: Sequence[Statistics]) -> Statistics:
    """One statistics over all samples, as collecting over all of them at once would give.

    Raises:
        StatisticsError: nothing to merge, or two that do not match.
    """
    if not statistics:
        raise StatisticsError("nothing to merge: name at least one statistics file.")
    total = statistics[0]
    for item in statistics[1:]:
        total = total + item
    return total


def combined_moment(
    statistics: Sequence[Statistics], layer: str, weights: Sequence[float] | None = None
) -> Moment:
    """`S_other = Σ_u w_u S_u` at a layer, the weights made to sum to one (equal by default)."""
    return combine([item.moment(layer) for item in statistics], weights)

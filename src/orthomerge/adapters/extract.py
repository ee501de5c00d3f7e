"""A LoRA adapter out of a full fine-tune: the difference of two checkpoints, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge import linalg
from orthomerge.adapters.architecture import (
    Architecture,
    Names,
    architecture_of,
    read_config,
    task_type_of,
)
from orthomerge.adapters.base import find_base
from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.adapters.heads import CLASSIFIERS
from orthomerge.adapters.resize import require_lower_rank
from orthomerge.adapters.write import AdapterWriter, Frame
from orthomerge.errors import AdapterError, OrthomergeWarning, unknown_name
from orthomerge.io.files import atomic_path
from orthomerge.io.names import EXTRACT
from orthomerge.io.outputs import require_free
from orthomerge.io.tensors import DTYPES, FLOATS, LazyTensors, Stored, read_tensor, require_finite
from orthomerge.merging import AUTO, MergeConfig
from orthomerge.merging.parts.lowrank import truncate_dense, truncate_to_energy
from orthomerge.models.assets import ResolvedModel
from orthomerge.records import seal
from orthomerge.records.contents import about_base, versions

REFUSE, SAVE, LEAVE = OTHERS = ("refuse", "save", "leave out")
"""What can become of changed tensors that no LoRA layer holds."""
_FAR = 0.5


@dataclass(frozen=True)
class Extracted:
    """What was written: rank and relative error of every layer, what is whole, what is left out.

    `change` is `‖W' - W‖ / ‖W‖` over all layers, `energy` the part of `‖W' - W‖²` that is kept.
    """

    path: Path
    ranks: dict[str, int]
    truncation_error: dict[str, float]
    change: float
    energy: float
    whole: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])


def extract_adapter(
    base: str,
    finetuned: str,
    output: str | Path,
    *,
    rank: int | str = AUTO,
    energy: float | None = None,
    others: str = REFUSE,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Use to merge a fully fine-tuned model with adapters: what it learnt, as a LoRA adapter.

    Of every linear layer (`Linear`, `Conv1D`) that changed, `W' - W` becomes its best approximation
    in Frobenius norm, of rank `rank` or of the least rank that keeps `energy` of its squared norm.
    A task's head is kept whole among `modules_to_save`. Both checkpoints are read a tensor at a
    time; memory holds one layer. O(d_out d_in min(d)) per layer with "auto", less for a small rank.

    Args:
        base: the base model's folder or id; the adapter names it so.
        finetuned: the fine-tuned model's.
        output: the folder to write; it appears whole or not at all.
        rank: a whole number, or "auto".
        energy: with "auto", the part of each layer's squared norm to keep; 0.99 by default.
        others: what becomes of other tensors that changed, as norms, embeddings and biases:
            "refuse" them, "save" them whole (norms and embeddings among `modules_to_save`, biases
            of layers by `lora_bias`, embeddings with added tokens as PEFT does), or "leave out".
        overwrite: replace an output folder that orthomerge wrote.
        progress: called with the number of layers done and their total.

    Raises:
        AdapterError: models of two architectures, of no class of Transformers, pickled or
            quantized; nothing that changed; or other tensors that changed and are refused.
        MergeError: a rank or an energy that is none.
        OutputError: an output that is not free, or that contains a model or is inside one.
    """
    config = MergeConfig(rank=rank, energy=energy)
    require_lower_rank(rank)
    if others not in OTHERS:
        raise unknown_name("treatment of other tensors", others, OTHERS, error=AdapterError)
    require_free(output, inputs=[finetuned], base=base, overwrite=overwrite)
    before, after = find_base(base), find_base(finetuned)
    change = _Change.between(before, after)
    parts = change.sorted(others)
    cut = partial(truncate_to_energy, energy=config.energy) if config.energy else None
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    moved = kept = size = 0.0
    with atomic_path(output) as folder:
        with AdapterWriter(folder, parts.layers, parts.frame(change, before)) as writer:
            for done, layer in enumerate(parts.layers, start=1):
                delta, norm = change.of_layer(layer)
                part, lost = cut(delta) if cut else truncate_dense(delta, int(rank))
                writer.add(layer, part)
                ranks[layer], errors[layer] = part.rank, lost
                total = float(linalg.vector_norm(delta.double())) ** 2
                moved, kept, size = moved + total, kept + total * (1 - lost**2), size + norm**2
                if progress is not None:
                    progress(done, len(parts.layers))
        found = Extracted(
            Path(output), ranks, errors, (moved / size) ** 0.5 if size else 0.0,
            kept / moved if moved else 1.0, sorted(parts.whole), sorted(parts.left_out),
        )  # fmt: skip
        seal(folder, EXTRACT, _record(found, config, before, after))
    _warn(found, base, finetuned)
    return found


def _record(
    found: Extracted, config: MergeConfig, before: ResolvedModel, after: ResolvedModel
) -> dict[str, Any]:
    return {
        **about_base(before.name, before.name, before.sha256),
        "finetuned": {"name": after.name, "sha256": after.sha256},
        "rank": config.rank,
        "energy": config.energy,
        "kept_energy": found.energy,
        "truncation_error": found.truncation_error,
        "whole": found.whole,
        "left_out": found.left_out,
        "versions": versions(),
    }


def _warn(found: Extracted, base: str, finetuned: str) -> None:
    if found.left_out:
        warnings.warn(
            f"{len(found.left_out)} changed tensors of '{finetuned}' are not in the adapter, which "
            f"therefore is not the model: {_listed(found.left_out)}.",
            OrthomergeWarning,
            stacklevel=3,
        )
    if found.change > _FAR:
        warnings.warn(
            f"'{finetuned}' differs from '{base}' by {found.change:.0%} of its weights: make sure "
            "that it was trained from that base.",
            OrthomergeWarning,
            stacklevel=3,
        )


def _listed(names: Iterable[str]) -> str:
    said = sorted(names)
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    return ", ".join(f"'{name}'" for name in said[:3]) + more


@dataclass
class _Parts:
    """What becomes of what changed, by the class's names of it.

    `layers` become LoRA; `biases` are of these; `whole` tensors are kept whole, `modules` being the
    modules that they belong to; `copies` are embeddings with rows for added tokens.
    """

    layers: list[str] = field(default_factory=list[str])
    biases: list[str] = field(default_factory=list[str])
    whole: list[str] = field(default_factory=list[str])
    copies: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    modules: set[str] = field(default_factory=set[str])

    def frame(self, change: _Change, base: ResolvedModel) -> Frame:
        """What the adapter is besides its factors."""
        shape = change.shape
        ends = {name.rpartition(".")[2] for name in self.layers}
        alike = {name for name in shape.linear if name.rpartition(".")[2] in ends}
        saved = {m.rpartition(".")[2] for m in self.modules}
        there = {m for m in _modules(shape) if m.endswith(tuple(saved))}  # as PEFT finds them
        return Frame(
            base_model=base.name,
            revision=base.revision if base.source == "hub" else None,
            targets=sorted(ends) if alike == set(self.layers) else None,
            biases={name.removesuffix(".bias"): change.of_tensor(name) for name in self.biases},
            modules=LazyTensors({n: change.stored(n) for n in self.whole}, "the fine-tune"),
            copies=LazyTensors({n: change.stored(n) for n in self.copies}, "the fine-tune"),
            modules_to_save=sorted(saved if there == self.modules else self.modules) or None,
            task_type=change.task_type,
            transposed=any(shape.transposes(f"{name}.weight") for name in self.layers),
        )


def _modules(shape: Architecture) -> set[str]:
    return {name.rpartition(".")[0] for name in shape.shapes}


class _Change:
    """Two checkpoints of one architecture: the tensors of the second by its class's names."""

    def __init__(
        self,
        shape: Architecture,
        before: Mapping[str, Stored],
        after: Mapping[str, Stored],
        task_type: str | None,
    ) -> None:
        self.shape, self.task_type = shape, task_type
        self._before, self._names = before, Names(shape, before)
        self._after = {own: item for key, item in after.items() if (own := shape.own_key(key))}
        lost = [key for key in after if shape.own_key(key) is None and shape.fuses(key)]
        if lost:
            raise AdapterError(
                f"'{lost[0]}' is kept packed with others by {shape.called}, as the experts of a "
                "mixture are: no adapter can be extracted of such a model yet."
            )
        self._other_end = {shape.bare(t): s for t, s in shape.ties}
        self._ties = {shape.bare(source): target for target, source in shape.ties}

    @classmethod
    def between(cls, base: ResolvedModel, finetuned: ResolvedModel) -> _Change:
        """The change from one model to another.

        Raises:
            AdapterError: one is quantized or pickled, or the second of no class of Transformers.
        """
        first, second = Path(base.path_or_id), Path(finetuned.path_or_id)
        for folder in (first, second):
            if read_config(folder).get("quantization_config"):
                raise AdapterError(
                    f"'{folder}' is quantized, so that a difference would be its rounding: name "
                    "both models in 16 or 32 bits."
                )
        shape = architecture_of(second, read_config(second))
        if not shape.known:
            raise AdapterError(
                f"'{second}' is of no class that Transformers has, so its layers are not known."
            )
        old, new = read_checkpoint(first).tensors, read_checkpoint(second).tensors
        return cls(shape, old, new, task_type_of(second))

    def stored(self, name: str) -> Stored:
        """The fine-tuned tensor; of two that are tied, the one that is there."""
        other = self._other_end.get(self.shape.bare(name), name)
        return self._after[name] if name in self._after else self._after[other]

    def _old(self, name: str) -> Stored | None:
        """The base's tensor, or that which it is tied to."""
        other = self._other_end.get(self.shape.bare(name), name)
        key = self._names.find(name) or self._names.find(other)
        return None if key is None else self._before[key]

    def of_tensor(self, name: str) -> Tensor:
        """`W' - W`, worked out in float64, in float32."""
        stored = self._old(name)
        assert stored is not None
        new, old = (
            require_finite(read_tensor(item), f"'{name}'", str(item.path)).double()
            for item in (self._after[name], stored)
        )
        return (new - old).float()

    def of_layer(self, layer: str) -> tuple[Tensor, float]:
        """The layer's `W' - W`, `[d_out, d_in]`, and `‖W‖`."""
        name = f"{layer}.weight"
        old = self._old(name)
        assert old is not None
        delta = self.of_tensor(name)
        norm = float(linalg.vector_norm(read_tensor(old).double()))
        return (delta.T if self.shape.transposes(name) else delta), norm

    def sorted(self, others: str) -> _Parts:
        """What becomes of every tensor that changed.

        Raises:
            AdapterError: nothing changed, a tensor has another shape, or one is refused.
        """
        parts = _Parts()
        beside = list(self._sort(parts))
        if others == REFUSE and beside:
            raise AdapterError(
                f"{len(beside)} tensors changed that no LoRA layer holds ({_listed(beside)}): save "
                "them whole with --modules-to-save (others='save'), or leave them out, and have "
                "another model, with --leave-out (others='leave out')."
            )
        if others == LEAVE:
            parts.left_out = beside
        else:
            self._save(parts, beside)
        parts.layers = [n for n in parts.layers if not _below(n, parts.modules)]
        if not parts.layers:
            raise AdapterError(
                "no linear layer changed, so there is no adapter to extract: name the model that "
                "was fine-tuned, and its base."
            )
        return parts

    def _sort(self, parts: _Parts) -> Iterator[str]:
        """Put layers and the head in their places; the other tensors that changed."""
        shape, classifier = self.shape, self.task_type in CLASSIFIERS
        for name, item in self._after.items():
            old, layer = self._old(name), name.removesuffix(".weight")
            head = classifier and not shape.in_backbone(shape.bare(name))
            same = old is not None and _same(old, item)
            if item.dtype not in FLOATS or (same and not head):  # PEFT asks for the head itself
                continue
            if head or old is None:  # the base has none, or draws it anew
                module = name.split(".")[0] if head else name.rpartition(".")[0]
                self._whole(parts, module)
            elif old.shape != item.shape and layer not in shape.ends:
                raise AdapterError(
                    f"'{name}' is {list(old.shape)} in the base and {list(item.shape)} in the "
                    "fine-tuned model: they are two architectures."
                )
            elif layer in shape.linear and old.shape == item.shape:
                parts.layers.append(layer)
            else:
                yield name

    def _save(self, parts: _Parts, names: Iterable[str]) -> None:
        """Keep tensors whole, each in the way that PEFT has for it."""
        for name in names:
            module, old = name.rpartition(".")[0], self._old(name)
            if old is not None and old.shape != self._after[name].shape:
                parts.copies.append(name)
            elif name.endswith(".bias") and module in self.shape.linear:
                parts.biases.append(name)
                if module not in parts.layers:
                    parts.layers.append(module)
            else:
                self._whole(parts, module)
                tied = self._ties.get(self.shape.bare(name))
                if tied is not None and tied not in parts.whole:
                    parts.whole.append(tied)
                    parts.modules.add(tied.rpartition(".")[0])

    def _whole(self, parts: _Parts, module: str) -> None:
        """Keep all tensors of a module whole."""
        if not module:
            raise AdapterError("a parameter of the model itself changed, which PEFT cannot save.")
        if module not in parts.modules:
            parts.modules.add(module)
            parts.whole += [name for name in self._after if name.startswith(f"{module}.")]


def _below(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _same(old: Stored, new: Stored) -> bool:
    """Whether two tensors are equal, read a block at a time where they are of one type."""
    if old.shape != new.shape:
        return False
    if old.dtype == new.dtype:
        return all(a == b for a, b in zip(old.chunks(), new.chunks(), strict=True))
    coarse = DTYPES[old.dtype if old.size < new.size else new.dtype]  # rounding is no change
    return bool((read_tensor(old).to(coarse) == read_tensor(new).to(coarse)).all())

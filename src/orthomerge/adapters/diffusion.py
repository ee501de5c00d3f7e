"""Adapters of diffusion models in one file: kohya's, diffusers', and from one to the other.

Names of layers are the file's own, with the factors' and processors' words taken out. They become
diffusers' where files of several forms meet, or where another form is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.diffusion_names import (
    AGREED,
    AUTHORS,
    FACTOR,
    KOHYA,
    OTHER_KINDS,
    SWAPPED,
    Place,
    dotted,
    family_of,
    kohya_place,
    with_component,
)
from orthomerge.adapters.kinds import StoredLayer, stored_layer
from orthomerge.adapters.settings import LayerPatterns
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.io.documents import Unreadable, is_object, parse_json
from orthomerge.io.tensors import Stored, open_tensors, read_metadata, read_tensor

FORMS = ("peft", "kohya", "diffusers")
"""What a file may be: PEFT's keys (`lora_A`), kohya's (`lora_down`), diffusers' (`lora.down`)."""

_METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's configurations into a file."""


@dataclass(frozen=True)
class DiffusionFile:
    """A file of an adapter of a diffusion model: its form, its layers and what its header says."""

    path: Path
    form: str
    layers: dict[str, StoredLayer]
    header: dict[str, str]


def read_diffusion_file(file: Path, source: str) -> DiffusionFile:
    """Names, shapes and scalings; no factor is read.

    The scaling is alpha over the rank, by the file's own `alpha` or by the configuration that
    diffusers writes into the header; it is 1 where there is neither.

    Raises:
        AdapterError: tensors of another kind than LoRA's, or halves that are missing or do not fit.
    """
    entries, header = open_tensors(file), read_metadata(file)
    parts: dict[str, dict[str, str]] = {}
    alphas: dict[str, Stored] = {}
    forms: set[str] = set()
    for key in entries:
        name = key.replace("base_model.model.", "")
        if name.endswith(".alpha"):
            alphas[_plain(name.removesuffix(".alpha"), "")] = entries[key]
            continue
        found = FACTOR.match(name)
        if found is None:
            kind = next((k for word, k in OTHER_KINDS.items() if word in key), None)
            said = f"is {kind}" if kind else "is of no known kind"
            raise AdapterError(
                f"'{source}' holds '{key}', which {said}: only LoRA's two factors can be merged; "
                "train it as LoRA, or write it as LoRA with the program that made it."
            )
        layer = _plain(found["layer"], found["old"] or "")
        side = "A" if re.search(r"(down|lora_A(\.default)?)\.weight$", name) else "B"
        if parts.setdefault(layer, {}).setdefault(side, key) != key:
            raise AdapterError(
                f"'{source}' holds layer '{layer}' twice, as '{parts[layer][side]}' and as "
                f"'{key}': save it again with the program that made it."
            )
        forms.add("diffusers" if found["old"] else "peft" if f".lora_{side}." in name else "kohya")
    if lost := sorted(alphas.keys() - parts.keys()):
        raise AdapterError(
            f"'{source}' holds an alpha of '{lost[0]}' and no factors of it: it was cut; save it "
            "again."
        )
    settings = _settings_of(header, source)
    layers = {
        layer: _stored(layer, found, entries, alphas.get(layer), settings, source)
        for layer, found in parts.items()
    }
    form = next((form for form in ("kohya", "diffusers") if form in forms), "peft")
    return DiffusionFile(file, form, layers, header)


def _plain(layer: str, old: str) -> str:
    """A layer's name without the words of diffusers' old processors."""
    name = layer.replace(".processor.", ".")
    if old == "_lora" or name.endswith("_lora"):
        name = name.removesuffix("_lora")
        stem, _, leaf = name.rpartition(".")
        if name.startswith("text_encoder"):
            leaf = f"{leaf.removeprefix('to_')}_proj"
        elif leaf == "to_out":
            leaf = "to_out.0"
        name = f"{stem}.{leaf}"
    return name if name.startswith((*KOHYA, AUTHORS)) else with_component(name)


def _settings_of(header: Mapping[str, str], source: str) -> dict[str, Any]:
    """PEFT's configurations in a header, by component and key (`unet.r`)."""
    if _METADATA not in header:
        return {}
    try:
        found = parse_json(header[_METADATA])
    except Unreadable as problem:
        raise AdapterError(
            f"'{source}' has a {_METADATA} that cannot be read ({problem}): save it again."
        ) from problem
    return found if is_object(found) else {}


def _stored(
    layer: str,
    found: Mapping[str, str],
    entries: Mapping[str, Stored],
    alpha: Stored | None,
    settings: Mapping[str, Any],
    source: str,
) -> StoredLayer:
    """One layer, its scaling from its own alpha, or from the header."""
    shape = entries[found["A"]].shape if "A" in found else ()
    rank = shape[0] if shape else 0
    component, _, rest = layer.partition(".")
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in settings.items()
        if key.startswith(f"{component}.")
    }
    config: dict[str, Any] = {"use_rslora": own.get("use_rslora"), "use_dora": own.get("use_dora")}
    if alpha is not None:
        scaled = float(read_tensor(alpha).double().sum()) if alpha.shape in ((), (1,)) else None
        if scaled is None or not abs(scaled) < float("inf"):
            raise AdapterError(
                f"the alpha of layer '{layer}' of '{source}' is no finite number: save it again."
            )
        return stored_layer(layer, found, entries, {}, source, rank, scaled)
    if not isinstance(own.get("r"), int):
        return stored_layer(layer, found, entries, {}, source, rank, rank)
    ranks, alphas = (
        LayerPatterns(own.get(pattern), own.get(key, own["r"]), source)
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    given, of = float(alphas.of(rest)), int(ranks.of(rest))
    return stored_layer(layer, found, entries, config, source, of, given)


class DerivedLayers(Mapping[str, LoraFactors]):
    """Layers made of others, each when it is asked for; `shapes` are known before."""

    def __init__(self, made: Mapping[str, tuple[tuple[int, int], Callable[[], LoraFactors]]]):
        self._made = dict(made)
        self.shapes = {name: shape for name, (shape, _) in self._made.items()}

    def __getitem__(self, name: str) -> LoraFactors:
        return self._made[name][1]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, name: object) -> bool:
        return name in self._made


@dataclass(frozen=True)
class Layers:
    """An adapter's layers with their shapes, windows and what an error calls the adapter."""

    factors: Mapping[str, LoraFactors]
    shapes: Mapping[str, tuple[int, int]]
    kernels: Mapping[str, tuple[int, ...]]
    header: Mapping[str, str]
    called: str


def named_as_diffusers(given: Layers) -> Layers:
    """The layers under diffusers' names, those that are several there split by rows.

    Raises:
        AdapterError: a layer without such a name, or two of one.
    """
    made: dict[str, tuple[tuple[int, int], Callable[[], LoraFactors]]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for name, (d_out, d_in) in given.shapes.items():
        parts = dotted(name)
        sizes = _sizes(d_out, d_in, len(parts or ()))
        if parts is None or sizes is None:
            raise AdapterError(
                f"'{given.called}' has a layer '{name}' of {[d_out, d_in]}, which no layer of "
                "Stable Diffusion, SDXL or Flux in diffusers is: only files of one form, with the "
                "same names, can be merged with it."
            )
        ends = list(accumulate(sizes, initial=0))
        swap = name.endswith(("final_layer_adaLN_modulation_1", "final_layer.adaLN_modulation.1"))
        for part, (first, last) in zip(parts, pairwise(ends), strict=True):
            if part in made:
                raise AdapterError(
                    f"'{given.called}' holds layer '{part}' twice: save it again with the program "
                    "that made it."
                )
            make = partial(_rows, given.factors, name, slice(first, last), swap)
            made[part] = ((last - first, d_in), make)
            if given.kernels.get(name):
                kernels[part] = given.kernels[name]
    found = DerivedLayers(made)
    return replace(given, factors=found, shapes=found.shapes, kernels=kernels)


def _sizes(d_out: int, d_in: int, count: int) -> list[int] | None:
    """The rows of each of the parts that Flux keeps as one: all but the last have d_in."""
    sizes = [d_in] * (count - 1) + [d_out - (count - 1) * d_in]
    return sizes if count == 1 or sizes[-1] in (d_in, 4 * d_in) else None


def _rows(layers: Mapping[str, LoraFactors], name: str, rows: slice, swap: bool) -> LoraFactors:
    found = layers[name]
    B = _swapped(found.B) if swap else found.B[rows]
    return LoraFactors(found.A, B, found.scaling)


def _swapped(B: Tensor) -> Tensor:
    return torch.cat(B.chunk(2)[::-1])


def named_as_kohya(given: Layers) -> Layers:
    """The layers under kohya's names, those that are one there put together.

    Raises:
        AdapterError: a layer without such a name, or layers from which it does not follow whether
            the model is Stable Diffusion, SDXL or Flux.
    """
    given = named_as_diffusers(given)
    family = family_of(given.shapes, given.header, given.called)
    if family is None:
        raise AdapterError(
            f"'{given.called}' does not show whether it is of Stable Diffusion or SDXL, whose "
            "layers kohya names differently: leave it in its form."
        )
    groups: dict[str, dict[int, str]] = {}
    places: dict[str, Place] = {}
    for name in given.shapes:
        place = kohya_place(name, family)
        if place is None:
            raise AdapterError(
                f"'{given.called}' has a layer '{name}', for which kohya has no name: leave it in "
                "its form."
            )
        groups.setdefault(place.name, {})[place.part] = name
        places[place.name] = place
    made: dict[str, tuple[tuple[int, int], Callable[[], LoraFactors]]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for own, group in groups.items():
        names = [group.get(i) for i in range(len(places[own].parts) or 1)]
        some = next(iter(group.values()))
        d_in = given.shapes[some][1]
        sizes = [
            given.shapes[n][0] if n else (4 * d_in if part.endswith("proj_mlp") else d_in)
            for n, part in zip(names, places[own].parts or (own,), strict=True)
        ]
        swap = some.endswith(f".{SWAPPED}")
        make = partial(_together, given.factors, names, sizes, swap)
        made[own] = ((sum(sizes), d_in), make)
        if given.kernels.get(some):
            kernels[own] = given.kernels[some]
    found = DerivedLayers(made)
    return replace(given, factors=found, shapes=found.shapes, kernels=kernels)


def _together(
    layers: Mapping[str, LoraFactors],
    names: Sequence[str | None],
    sizes: Sequence[int],
    swap: bool,
) -> LoraFactors:
    """Layers of one input under each other: one A where all have the same, else A's stacked."""
    if len(names) == 1:
        found = layers[str(names[0])]
        return LoraFactors(found.A, _swapped(found.B), found.scaling) if swap else found
    parts = {place: layers[name] for place, name in enumerate(names) if name is not None}
    first = next(iter(parts.values()))
    ends = list(accumulate(sizes, initial=0))
    if all(f.A.shape == first.A.shape and torch.equal(f.A, first.A) for f in parts.values()):
        B = first.B.new_zeros(ends[-1], first.rank)
        for place, f in parts.items():
            B[ends[place] : ends[place + 1]] = f.B * f.scaling
        return LoraFactors(first.A, B)
    tall = [
        LoraFactors(
            f.A,
            torch.cat(
                [f.B.new_zeros(ends[i], f.rank), f.B, f.B.new_zeros(ends[-1] - ends[i + 1], f.rank)]
            ),
            f.scaling,
        )
        for i, f in parts.items()
    ]
    return weighted_sum(tall, [1.0] * len(tall))


def common_header(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all inputs' headers say of the base model."""
    return {
        key: headers[0][key]
        for key in AGREED
        if key in headers[0] and all(h.get(key) == headers[0][key] for h in headers)
    }


def keys_of(name: str, form: str) -> tuple[str, str, str]:
    """What a file of this form calls a layer's A, B and alpha; no alpha is "" ."""
    if form == "kohya":
        return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
    component = name.partition(".")[0]
    # diffusers looks at one key to tell whether all are so.
    if form == "diffusers" and component != "transformer":
        stem = f"{name}.lora{'' if component == 'unet' else '_linear_layer'}"
        return f"{stem}.down.weight", f"{stem}.up.weight", ""
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", ""


def evenly_scaled(factors: LoraFactors) -> LoraFactors:
    """The scaling put into both factors, a power of two into A: small types keep what they hold."""
    if factors.scaling <= 0:
        return LoraFactors(factors.A, factors.B * factors.scaling)
    root = 2.0 ** round(log2(factors.scaling) / 2)
    return LoraFactors(factors.A * root, factors.B * (factors.scaling / root))


def of_one_style(names: Collection[str]) -> str:
    """How a file's layers are named: "kohya", "authors" or "diffusers"."""
    if any(name.startswith(KOHYA) for name in names):
        return "kohya"
    return "authors" if any(name.startswith(AUTHORS) for name in names) else "diffusers"

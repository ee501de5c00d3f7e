"""PEFT adapter folders read into factors, a layer at a time. Only safetensors is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from orthomerge.adapters.base import BaseWeights, dora_update
from orthomerge.adapters.diffusion import DerivedLayers, read_diffusion_file
from orthomerge.adapters.diffusion_names import find_diffusion_file
from orthomerge.adapters.experts import unpacked
from orthomerge.adapters.hub import locate_adapter
from orthomerge.adapters.keys import parse_keys
from orthomerge.adapters.kinds import StoredLayer, check_kind, sort_keys
from orthomerge.adapters.mistaken import no_adapter
from orthomerge.adapters.settings import read_settings
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.io.files import known_sha256
from orthomerge.io.names import HEAD, WEIGHTS
from orthomerge.io.tensors import LazyTensors, Stored, open_tensors, read_tensor, require_finite
from orthomerge.models.assets import ResolvedModel, resolve_model


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, in memory or in its file.

    `layers` maps a layer's name in the base model to its factors; one that was read from a folder
    reads a layer when it is asked for and keeps none. `modules` holds the weights of
    `modules_to_save` (the head) by name, as lazily; `biases` those that `lora_bias` adds to a
    layer's output, scaling included; `embeddings` are the layers that are embeddings, whose update
    is `[dim, vocabulary]`; `config` is `adapter_config.json` as it stands; `source` is what the
    user called it, or the hub's id and commit; `renamed` holds, by the names here, what its own
    file calls the layers that have other names there; `copies` holds the base's own embeddings as
    they were when it was trained, by name, where the adapter brings them; `kernels` the window of
    the layers that are convolutions, whose update is `[d_out, channels · window]`; `parameters` the
    number of experts (1 for a matrix) of every tensor that `target_parameters` adapts, whose
    experts are layers by the tensor's name and their number; `form` one of `diffusion.FORMS` where
    it is the file of a diffusion model, `header` what that file's says.
    """

    name: str
    layers: Mapping[str, LoraFactors]
    modules: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    path: Path | None = None
    sha256: str | None = None
    biases: Mapping[str, Float[Tensor, " d_out"]] = field(
        default_factory=dict[str, Float[Tensor, " d_out"]]
    )
    embeddings: frozenset[str] = frozenset()
    source: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    copies: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    parameters: Mapping[str, int] = field(default_factory=dict[str, int])
    form: str | None = None
    header: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def base_model(self) -> str | None:
        """The base model the adapter says it belongs to."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The revision of the base model that the adapter says it belongs to."""
        return self.config.get("revision")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape (d_out, d_in) of every layer's update, without reading a layer."""
        if isinstance(self.layers, LazyLayers | DerivedLayers):
            return self.layers.shapes
        return {name: factors.shape for name, factors in self.layers.items()}

    @property
    def called(self) -> str:
        """What an error calls it."""
        return self.source or str(self.path or self.name)


class LazyLayers(Mapping[str, LoraFactors]):
    """The layers of an adapter's file, each read when it is asked for; none is kept.

    But for B of the last experts, which all of one tensor share.
    """

    def __init__(
        self,
        layers: Mapping[str, StoredLayer],
        base: BaseWeights | None = None,
        *,
        transposed: bool = False,
        source: str = "adapter",
    ) -> None:
        self._layers, self._base, self._transposed = layers, base, transposed
        self._source = source
        self.shapes = {name: layer.shape for name, layer in layers.items()}
        self.base_sha256 = base.sha256 if base is not None else None
        self._last: tuple[Stored, Tensor] | None = None

    def __getitem__(self, name: str) -> LoraFactors:
        layer = self._layers[name]
        factors = read_tensor(layer.A).flatten(1), self._B(layer)
        A, B = (self._finite(name, factor) for factor in factors)
        factors = LoraFactors(A, B.to(A.dtype), layer.scaling)
        if layer.magnitude is None:
            return factors
        assert self._base is not None
        turned = layer.embedding or self._transposed
        weight = self._base.weight(name, layer.shape, transposed=turned)
        return dora_update(factors, self._finite(name, read_tensor(layer.magnitude)), weight)

    def _B(self, layer: StoredLayer) -> Tensor:
        if layer.expert is None:
            return read_tensor(layer.B).flatten(1)
        last = self._last
        if last is None or last[0] != layer.B:
            last = self._last = layer.B, read_tensor(layer.B)
        return unpacked(last[1], *layer.expert)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        return require_finite(tensor, f"layer '{name}'", self._source)

    def renamed(self, names: Mapping[str, str]) -> LazyLayers:
        """The same layers under other names, by those they have."""
        layers = {names[name]: layer for name, layer in self._layers.items()}
        return LazyLayers(layers, self._base, transposed=self._transposed, source=self._source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers


def renamed_layers(
    layers: Mapping[str, LoraFactors], names: Mapping[str, str]
) -> Mapping[str, LoraFactors]:
    """Layers under other names, by those they have; those of a file are still read when asked."""
    if isinstance(layers, LazyLayers):
        return layers.renamed(names)
    return {names[name]: factors for name, factors in layers.items()}


def read_adapter(path: str | Path, *, base: str | None = None) -> Adapter:
    """Open a PEFT LoRA folder, a diffusion model's file, or the hub's `org/name[@revision]`.

    Names and shapes are read now, tensors when they are asked for. Scaling follows rank and alpha
    patterns and rsLoRA. DoRA needs the base model's weights: `base`, a folder or an id, or else
    the one its configuration names.

    Raises:
        AdapterError: no adapter there, pickled weights, a file that was cut, a kind whose update
            is not `B A` or DoRA's, factors that do not pair up or fit, or DoRA without its base;
            where a layer is asked for, values that are not finite.
    """
    folder, name, source = locate_adapter(path)
    file = find_diffusion_file(folder)
    if file is not None:
        if file != folder and source == str(path):
            source = str(Path(path) / file.name)
        return _of_diffusion(file, name.removesuffix(".safetensors"), source)
    config, weights = read_settings(folder, source), folder / WEIGHTS
    require_safetensors(folder, source)
    check_kind(config, source)
    layers, modules, copies = sort_keys(open_tensors(weights), config, source)
    base_weights = _base_of(config, base, source) if config.get("use_dora") else None
    return Adapter(
        name,
        LazyLayers(
            layers, base_weights, transposed=bool(config.get("fan_in_fan_out")), source=source
        ),
        LazyTensors(modules, source),
        config,
        folder,
        known_sha256(weights),
        {
            n: require_finite(read_tensor(item.bias), f"the bias of layer '{n}'", source)
            * item.scaling
            for n, item in layers.items()
            if item.bias
        },
        frozenset(n for n, item in layers.items() if item.embedding),
        source,
        copies=LazyTensors(copies, source),
        kernels={n: item.kernel for n, item in layers.items() if item.kernel},
        parameters={
            item.parameter: item.expert[1] if item.expert else 1
            for item in layers.values()
            if item.parameter
        },
    )


def _of_diffusion(file: Path, name: str, source: str) -> Adapter:
    found = read_diffusion_file(file, source)
    return Adapter(
        name,
        LazyLayers(found.layers, source=source),
        path=file,
        sha256=known_sha256(file),
        source=source,
        kernels={n: item.kernel for n, item in found.layers.items() if item.kernel},
        form=found.form,
        header=found.header,
    )


def require_safetensors(folder: Path, source: str) -> None:
    """Refuse a folder whose weights would have to be unpickled, or that has none.

    Raises:
        AdapterError: one of the two; the message says how to convert pickled weights.
    """
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"'{source}' holds pickled weights (adapter_model.bin), which are never read: load it "
            "once in PEFT and save it again with save_pretrained to get safetensors."
        )
    raise no_adapter(folder, source)


def check_start(folder: Path) -> None:
    """Refuse what PEFT would unpickle, and ranks that would take memory before a tensor is read.

    Raises:
        AdapterError: one of the two, or files that cannot be read.
    """
    config = read_settings(folder, str(folder))
    require_safetensors(folder, str(folder))
    stored = open_tensors(folder / WEIGHTS)
    for key, meaning in parse_keys(stored, str(folder)).items():
        if meaning.part and meaning.plain != key and not key.endswith("magnitude_vector.weight"):
            raise AdapterError(
                f"'{folder}' holds '{key}', which PEFT would not read as '{meaning.plain}': "
                "write it anew with 'orthomerge merge' (of this one adapter, weight 1)."
            )
        require_finite(read_tensor(stored[key]), f"'{key}'", str(folder))
    widest = max((size for item in stored.values() for size in item.shape), default=0)
    pattern: dict[str, int] = config.get("rank_pattern") or {}
    ranks: list[int] = [r for r in (config.get("r"), *pattern.values()) if r]
    if max(ranks, default=0) > widest:
        raise AdapterError(
            f"'{folder}' names the rank {max(ranks):,} where its widest matrix has {widest:,} "
            "rows or columns: make the start again."
        )


def _base_of(config: Mapping[str, Any], base: str | None, source: str) -> BaseWeights:
    named = base or config.get("base_model_name_or_path")
    try:
        if not named:
            raise AdapterError("its configuration names none")
        return BaseWeights(named, None if base else config.get("revision"))
    except AdapterError as problem:
        raise AdapterError(
            f"'{source}' is a DoRA adapter, whose update needs the base model's weights "
            f"({str(problem).rstrip('.')}): name the base's folder with --base (base=...)."
        ) from problem


def base_of(adapter: Adapter, base: str | None = None) -> ResolvedModel:
    """The base model called `base`, by default the one the adapter names.

    Raises:
        AdapterError: neither names one.
        AssetError: it cannot be found.
    """
    name = base or adapter.base_model
    if not name:
        raise AdapterError(
            f"adapter '{adapter.path or adapter.name}' names no base model: name it with --base."
        )
    return resolve_model(name, revision=None if base else adapter.revision)


def require_same_base(adapters: Sequence[Adapter], *, base: str | None = None) -> None:
    """Refuse adapters of different base models, by the base's name, revision and layers' shapes.

    An adapter that names no base, or no revision of it, goes with any. With a `base` the user
    vouches for the names; different target modules are no difference.

    Raises:
        AdapterError: two adapters name different bases, or a layer has two shapes.
    """
    require_one_base(adapters, base=base)
    require_same_shapes(adapters)


def require_same_shapes(adapters: Sequence[Adapter]) -> None:
    """Refuse a layer that has two shapes, and experts of two numbers.

    Raises:
        AdapterError: there are such; the message names them and both shapes.
    """
    counts: dict[str, tuple[Adapter, int]] = {}
    for other in adapters:
        for tensor, count in other.parameters.items():
            known, expected = counts.setdefault(tensor, (other, count))
            if count != expected:
                raise AdapterError(
                    f"'{tensor}' is of {expected} experts in '{known.called}' and of {count} in "
                    f"'{other.called}': merge adapters of the same base model."
                )
    seen: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for other in adapters:
        for layer, flat in other.shapes.items():
            # A window of 1 is no other layer than the linear one.
            window = other.kernels.get(layer, ())
            shape = (flat[0], flat[1] // prod(window), *window) if prod(window) > 1 else flat
            known, expected = seen.setdefault(layer, (other, shape))
            if shape != expected:
                raise AdapterError(
                    f"layer '{layer}' is {list(expected)} in '{known.called}' and {list(shape)} in "
                    f"'{other.called}': merge adapters of the same base model."
                )


def require_one_kind(adapters: Sequence[Adapter]) -> None:
    """Refuse a classifier's adapter beside a language model's: no model is both.

    Raises:
        AdapterError: there are both.
    """
    classifier, writer = (
        next((a for a in adapters if a.config.get("task_type") in kinds), None)
        for kinds in (("SEQ_CLS", "TOKEN_CLS"), ("CAUSAL_LM", "SEQ_2_SEQ_LM"))
    )
    if classifier and writer:
        raise AdapterError(
            f"'{classifier.called}' is a classifier's adapter ({classifier.config['task_type']}) "
            f"and '{writer.called}' a language model's ({writer.config['task_type']}): no model is "
            "both, so use those of one kind together."
        )


def require_one_base(adapters: Sequence[Adapter], *, base: str | None = None) -> None:
    """Refuse two names of the base, and two revisions of one name, unless a `base` is given.

    And a classifier's adapter beside a language model's.

    Raises:
        AdapterError: there are two.
    """
    require_one_kind(adapters)
    if base:
        return
    named = [a for a in adapters if a.base_model]
    for other in named[1:]:
        if other.base_model != named[0].base_model:
            raise AdapterError(
                f"'{named[0].called}' belongs to '{named[0].base_model}' and '{other.called}' to "
                f"'{other.base_model}': only adapters of one base model can be merged; where both "
                "names mean one model, say which with --base (base=...)."
            )
    pinned = [a for a in named if a.revision]
    for other in pinned[1:]:
        if other.revision != pinned[0].revision:
            raise AdapterError(
                f"'{pinned[0].called}' belongs to '{pinned[0].base_model}' at the revision "
                f"'{pinned[0].revision}' and '{other.called}' at '{other.revision}': where both "
                "are the same weights, vouch for them with --base (base=...)."
            )


def common_base(adapters: Sequence[Adapter]) -> tuple[str | None, str | None]:
    """The base model and its revision, as the first adapter that names them has them."""
    name = next((a.base_model for a in adapters if a.base_model), None)
    return name, next((a.revision for a in adapters if a.base_model and a.revision), None)


def require_form(adapter: Adapter, form: str) -> None:
    """Refuse to ask a classifier for words, or a language model's adapter for a head's classes.

    `form` is "text" or "classifier"; an adapter of no task type may be either.

    Raises:
        AdapterError: the adapter is of the other form.
    """
    kind = adapter.config.get("task_type")
    if form == "text" and kind in ("SEQ_CLS", "TOKEN_CLS"):
        raise AdapterError(
            f"'{adapter.called}' is a classifier's adapter ({kind}), which answers no prompt: "
            "leave out --form text, or make its start with 'orthomerge init --task-type CAUSAL_LM' "
            "(SEQ_2_SEQ_LM for an encoder-decoder)."
        )
    if form == "classifier" and kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise AdapterError(
            f"'{adapter.called}' is a language model's adapter ({kind}) and has no head: ask it in "
            "words with --form text."
        )


def read_head(path: str | Path) -> Mapping[str, Tensor]:
    """A task's head, from a `heads/<task>.safetensors` or from the task's own adapter folder.

    Raises:
        AdapterError: neither of the two, or a file that is not safetensors.
    """
    path = Path(path)
    if path.is_dir():
        return read_adapter(path).modules
    if path.suffix != HEAD or not path.is_file():
        raise AdapterError(f"no head at '{path}': name an adapter folder or a {HEAD} file.")
    return LazyTensors(open_tensors(path), str(path))

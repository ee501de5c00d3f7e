"""Adapters of one base model under one name per layer, whatever class each was trained on.

`layers.0...` of `AutoModel` and `model.layers.0...` of `AutoModelForCausalLM` are one weight, and
so are the names of Transformers 4 and 5. The base's own classes tell, where its configuration is
on this machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from orthomerge.adapters.architecture import (
    CONFIG,
    Architecture,
    architectures_of,
    read_config,
)
from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.adapters.diffusion import (
    Layers,
    named_as_diffusers,
    named_as_kohya,
    of_one_style,
)
from orthomerge.adapters.diffusion_names import dotted, family_of
from orthomerge.adapters.experts import expert_layers, layer_at, of_older_layout, place_of
from orthomerge.adapters.files import (
    Adapter,
    common_base,
    renamed_layers,
    require_one_base,
    require_same_shapes,
)
from orthomerge.errors import AdapterError, AssetError, OrthomergeError, OrthomergeWarning, nearest
from orthomerge.io.documents import is_array
from orthomerge.io.files import local
from orthomerge.io.tensors import renamed_tensors, shapes_of
from orthomerge.models.hub import cached_file
from orthomerge.models.packaged import carrying
from orthomerge.models.wheels import packaged_model

PLAIN_NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        ("bart", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama",
         "mbart", "mistral", "modernbert", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2",
         "qwen3", "smollm3", "stablelm", "starcoder2"),
        "model",
    ),
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt2", "gpt_neo", "gptj"), "transformer"),
    **dict.fromkeys(("camembert", "roberta", "xlm-roberta"), "roberta"),
    **dict.fromkeys(("deberta", "deberta-v2"), "deberta"),
    **{name: name for name in ("albert", "bert", "distilbert", "electra", "mpnet")},
}  # fmt: skip
"""Model types whose layers have had one name in every Transformers, and what heads put before it.

Their names can be read in a checkpoint, without a class, whose import takes longer than a merge.
"""


def align_adapters(adapters: Sequence[Adapter], *, base: str | None = None) -> list[Adapter]:
    """Use before adapters are put together: the same adapters, one name per layer of the base.

    Where the base's configuration is on this machine (a folder, a package, the hub's cache), every
    layer is looked up in the classes that Transformers has for it. Names are those of the model
    with a head if any adapter has such, else those of the bare model. Elsewhere names stay. So they
    do, without a look at a class, where all adapters have the same ones and the base's checkpoint
    has them (`PLAIN_NAMES`).

    Raises:
        AdapterError: adapters of different bases, a layer that the base does not have or that has
            two shapes, or names that differ by a prefix alone where the base cannot be looked at.
    """
    if any(a.form for a in adapters):
        return _of_diffusion(adapters)
    require_one_base(adapters, base=base)
    named, revision = common_base(adapters)
    folder = config_folder(base or named, None if base else revision)
    if base is None and folder is not None and _agreed(adapters, folder):
        folder = None
    classes = _Classes(folder, adapters) if folder is not None else None
    if classes is not None and classes.known:
        found = [_renamed(a, classes, base or named) for a in adapters]
        classes.require_one_form(found)
    else:
        found = list(adapters)
        _refuse_prefixes(found)
        for adapter in found:
            if _of_old_peft(adapter) and any(n > 1 for n in adapter.parameters.values()):
                raise AdapterError(
                    f"'{adapter.called}' adapts experts and was saved by PEFT "
                    f"{adapter.config['peft_version']}, whose layout depends on the model: name "
                    "the base, in a folder, with --base (base=...), so that it can be looked up."
                )
    require_same_shapes(found)
    _warn_of_nothing_shared(found)
    return found


def _of_diffusion(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one diffusion model under one name per layer: diffusers' where theirs differ."""
    families = {family: a for a in adapters if (family := family_of(a.shapes, a.header, a.called))}
    if len(families) > 1:
        (one, first), (other, second) = list(families.items())[:2]
        raise AdapterError(
            f"'{first.called}' is of {one} and '{second.called}' of {other}: only adapters of one "
            "model can be merged."
        )
    own: dict[str, str] = {}
    styles = {"" if a.form is None else of_one_style(a.shapes) for a in adapters}
    differ = [
        name
        for a in adapters
        for name in a.shapes
        for part in dotted(name) or ()
        if own.setdefault(part, name) != name
    ]
    found = list(adapters)
    if len(styles) > 1 or differ:
        dotted_form = next((a.form for a in adapters if a.form not in (None, "kohya")), "peft")
        found = [renamed_in_form(a, dotted_form) for a in adapters]
    require_same_shapes(found)
    return [replace(a, form=found[0].form) for a in found]


def renamed_in_form(adapter: Adapter, form: str) -> Adapter:
    """An adapter of a diffusion model with the names of its layers in a form of `FORMS`.

    Raises:
        AdapterError: a layer that has no name there.
    """
    naming = named_as_kohya if form == "kohya" else named_as_diffusers
    given = Layers(adapter.layers, adapter.shapes, adapter.kernels, adapter.header, adapter.called)
    found = naming(given)
    return replace(adapter, layers=found.factors, kernels=found.kernels, form=form)


def config_folder(model: str | None, revision: str | None = None) -> Path | None:
    """Where the configuration of a base model is on this machine; None where it does not."""
    if not model:
        return None
    try:
        folder = local(model)
        if folder.is_dir():
            return folder if (folder / CONFIG).is_file() else None
        record = carrying(model)
        if record is not None:
            return packaged_model(record, fetch=False)
        cached = cached_file(model, CONFIG, revision)
    # No such id, or a package that was altered: then there is nothing to look at.
    except (AssetError, OrthomergeError, ValueError, OSError):
        return None
    return cached.parent if cached else None


def _agreed(adapters: Sequence[Adapter], folder: Path) -> bool:
    """Whether these adapters have the same names, each of them that of one layer of the base."""
    names = [(set(a.shapes), set(a.modules)) for a in adapters]
    if any(n != names[0] for n in names) or any(
        a.copies or a.embeddings or a.parameters for a in adapters
    ):
        return False
    try:
        prefix = PLAIN_NAMES.get(str(read_config(folder).get("model_type")))
        stored = read_checkpoint(folder).tensors if prefix else {}
    except AdapterError:
        return False
    bare = {key.removeprefix(f"{prefix}.") for key in stored}
    layers = names[0][0]
    found = {f"{layer}.weight".removeprefix(f"{prefix}.") for layer in layers}
    return len(found) == len(layers) and found <= bare


class _Classes:
    """The classes of one base model, built as they are needed, and the form of these adapters."""

    def __init__(self, folder: Path, adapters: Sequence[Adapter]) -> None:
        types = list(dict.fromkeys(a.config.get("task_type") for a in adapters))
        self._rest = architectures_of(folder, types)
        self._made: list[Architecture] = []
        self._kept: dict[str, str] = {}
        self.known = self._next() is not None
        tensors = {place_of(n, a.parameters)[0]: None for a in adapters for n in a.shapes}
        found = [(key, *place) for key in tensors if (place := self._look_up(key)) is not None]
        # Names of the model with a head, or of an older Transformers, are longer than bare ones.
        self._headed = any(bare != key or not shape.in_backbone(bare) for key, shape, bare in found)
        self._below = any(shape.inner for shape in self._made) or any(
            key == f"{shape.prefix}.{bare}" for key, shape, bare in found
        )

    def _next(self) -> Architecture | None:
        found = next(self._rest, None)
        if found is not None:
            self._made.append(found)
        return found

    def _look_up(self, key: str) -> tuple[Architecture, str] | None:
        """`_find`, for a tensor that may lie in a wrapper's `module`."""
        return self._find(key) or self._find(key.removeprefix("module."))

    def _find(self, key: str) -> tuple[Architecture, str] | None:
        """The first class that has a tensor, and its bare name."""
        place = 0
        while place < len(self._made) or self._next() is not None:
            shape = self._made[place]
            if shape.own_key(key) is not None or shape.fuses(key):
                return shape, shape.bare(key)
            place += 1
        return None

    def layers(self, adapter: Adapter, base: str | None) -> dict[str, str]:
        """What each layer is called here, by the adapter's own name of it.

        Raises:
            AdapterError: the base has no such layer, or two of them are one.
        """
        found = {layer: self._layer(layer, adapter, base) for layer in adapter.shapes}
        for tensor, count in adapter.parameters.items():
            self._check_experts(tensor, count, adapter)
        own: dict[str, str] = {}
        for layer, name in found.items():
            if own.setdefault(name, layer) != layer:
                raise AdapterError(
                    f"'{adapter.called}' holds layer '{name}' twice, as '{own[name]}' and as "
                    f"'{layer}': save it again with save_pretrained."
                )
        return found

    def require_one_form(self, adapters: Sequence[Adapter]) -> None:
        """Refuse experts as one tensor beside single ones: two names of one weight."""
        packed = [a for a in adapters if a.parameters]
        if self._kept and packed:
            single = next(iter(self._kept.values())).removesuffix(".weight")
            raise AdapterError(
                f"'{packed[0].called}' adapts all experts of a layer by target_parameters, and "
                f"another adapter single experts ('{single}'): only one of the two forms can be "
                "merged; train both with one Transformers."
            )

    def _layer(self, layer: str, adapter: Adapter, base: str | None) -> str:
        key, number = place_of(layer, adapter.parameters)
        found = self._look_up(key)
        if found is not None:
            shape, bare = found
            if shape.own_key(bare) is None:
                # Kept together with others, so that the class has no name: the first adapter's own.
                own = key.removeprefix("module.").removeprefix(f"{shape.prefix}.")
                bare = self._kept.setdefault(bare, own)
            return layer_at(self._called(shape, bare), number)
        known = [k.removesuffix(".weight") for shape in self._made for k in shape.shapes]
        close = nearest(layer, known)
        hint = f", the nearest is '{close}'" if close else ""
        raise AdapterError(
            f"'{adapter.called}' adapts the layer '{layer}', which no model of its base '{base}' "
            f"has ({self._made[0].called}{hint}): name the base that it was trained on with --base "
            "(base=...)."
        )

    def _check_experts(self, tensor: str, count: int, adapter: Adapter) -> None:
        """Refuse experts of another base, or in a layout that PEFT had once."""
        found = self._look_up(tensor)
        own = None if found is None else found[0].own_key(found[1])
        if count == 1 or found is None or own is None:
            return
        shape, has = found[0].shapes[own], adapter.shapes[expert_layers(tensor, count)[0]]
        transposed = found[0].transposes(own)
        expected = shape[:0:-1] if transposed else shape[1:]
        if shape[0] != count or sorted(has) != sorted(expected):
            raise AdapterError(
                f"'{adapter.called}' adapts '{tensor}' as {count} experts of {list(has)}, which "
                f"its base has as {list(shape)}: name the base that it was trained on with --base "
                "(base=...)."
            )
        odd_layout = _of_old_peft(adapter) and not transposed and has[0] == has[1]
        if has != expected or odd_layout:
            raise _old_layout(adapter, tensor)

    def whole(self, name: str) -> str:
        """What a whole tensor is called here; one that no class so far has keeps its name."""
        shape = next((s for s in self._made if s.own_key(name) is not None), None)
        return name if shape is None else self._called(shape, shape.bare(name))

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the base has a tensor of this name and shape."""
        return any(
            key is not None and made.shapes[key] == shape
            for made in self._made
            for key in (made.own_key(name),)
        )

    def _called(self, shape: Architecture, bare: str) -> str:
        """A tensor's name in the form of these adapters, by its bare name."""
        under = self._headed and self._below and shape.in_backbone(bare)
        return f"{shape.prefix}.{bare}" if under else bare


def _renamed(adapter: Adapter, classes: _Classes, base: str | None) -> Adapter:
    """The adapter with the base's names of its layers and whole tensors."""
    layers = classes.layers(adapter, base)
    modules = {name: classes.whole(name) for name in adapter.modules}
    # Below an adapted layer PEFT keeps the base's own rows even where none were added.
    copies = {
        name: classes.whole(name)
        for name, shape in shapes_of(adapter.copies).items()
        if name.rpartition(".")[0] not in layers or not classes.has(name, shape)
    }
    same = all(old == new for old, new in (layers | modules | copies).items())
    if same and len(copies) == len(adapter.copies):
        return adapter
    return replace(
        adapter,
        layers=renamed_layers(adapter.layers, layers),
        modules=renamed_tensors(adapter.modules, modules),
        copies=renamed_tensors(adapter.copies, copies),
        biases={layers[name]: bias for name, bias in adapter.biases.items()},
        embeddings=frozenset(layers[name] for name in adapter.embeddings),
        kernels={layers[name]: kernel for name, kernel in adapter.kernels.items()},
        renamed={new: old for old, new in layers.items() if new != old},
        parameters=_renamed_parameters(adapter, layers),
    )


def _renamed_parameters(adapter: Adapter, layers: Mapping[str, str]) -> dict[str, int]:
    """The tensors of experts by the names that their layers have here."""
    found: dict[str, int] = {}
    for tensor, count in adapter.parameters.items():
        first = layers[expert_layers(tensor, count)[0]]
        found[f"{first}.weight" if count == 1 else first.removesuffix(".0")] = count
    return found


def _of_old_peft(adapter: Adapter) -> bool:
    return of_older_layout(str(adapter.config.get("peft_version")))


def _old_layout(adapter: Adapter, tensor: str) -> AdapterError:
    return AdapterError(
        f"'{adapter.called}' keeps the factors of '{tensor}' in the layout of PEFT before 0.19.1"
        ", which no later PEFT reads: merge its update into the base with the PEFT that wrote it "
        "(merge_and_unload)."
    )


def _refuse_prefixes(adapters: Sequence[Adapter]) -> None:
    """Refuse layers whose names differ by a prefix alone: most likely they are one weight."""
    for one, other in combinations(adapters, 2):
        own, theirs = set(one.shapes) - set(other.shapes), set(other.shapes) - set(one.shapes)
        for first, second, names, longer in (
            (one, other, own, theirs), (other, one, theirs, own),
        ):  # fmt: skip
            pair = next(((n, end) for n in longer for end in _ends(n) if end in names), None)
            if pair is not None:
                raise AdapterError(
                    f"'{first.called}' calls a layer '{pair[1]}' and '{second.called}' one "
                    f"'{pair[0]}', which may be the same: name their base, in a folder, with "
                    "--base (base=...), so that it can be looked up."
                )


def _ends(name: str) -> list[str]:
    """A layer's name without the first one, two or three of its parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, min(4, len(parts)))]


def _warn_of_nothing_shared(adapters: Sequence[Adapter]) -> None:
    for one, other in combinations(adapters, 2):
        if _targets(one) and _targets(one) == _targets(other) and not (
            one.shapes.keys() & other.shapes.keys()
        ):  # fmt: skip
            warnings.warn(
                f"'{one.called}' and '{other.called}' name the same target modules and share no "
                f"layer ('{next(iter(one.shapes))}', '{next(iter(other.shapes))}'): make sure that "
                "they were trained on the same model.",
                OrthomergeWarning,
                stacklevel=3,
            )
            return


def _targets(adapter: Adapter) -> frozenset[str]:
    named = adapter.config.get("target_modules")
    if isinstance(named, str):
        return frozenset([named])
    return frozenset(str(n) for n in named) if is_array(named) else frozenset()

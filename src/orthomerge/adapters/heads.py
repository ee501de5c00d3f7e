"""What becomes of task heads and of other whole tensors in a merge: kept, averaged or refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthomerge.adapters.files import Adapter
from orthomerge.adapters.kinds import EMBEDDINGS
from orthomerge.errors import AdapterError
from orthomerge.io.files import slug
from orthomerge.io.tensors import renamed_tensors, shapes_of
from orthomerge.merging import HEADS

POLICIES = HEADS
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types whose head PEFT adds to what it loads."""


class Whole(NamedTuple):
    """The whole tensors that a merged adapter or model holds, by name.

    `modules` are heads and parts of the model that were trained; `copies` the base's own
    embeddings, which were resized for added tokens; `with_head` says that a task's head is one.
    """

    modules: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]
    with_head: bool = False


def is_head(name: str, adapter: Adapter) -> bool:
    """Whether a trained whole tensor is of one task's head; else it is a part of the model.

    A language model has no head of a task, and embeddings never are one.
    """
    kind = adapter.config.get("task_type")
    return kind in (None, *CLASSIFIERS) and name.rpartition(".")[0].rpartition(".")[2] not in (
        EMBEDDINGS
    )


def require_runnable(adapter: Adapter) -> None:
    """Use before a model runs with an adapter's layers and head: it leaves all else of it out.

    Raises:
        AdapterError: it has biases, experts, rows for added tokens, or parts of the model trained
            whole.
    """
    beside = [
        *("biases (lora_bias)" for _ in [*adapter.biases][:1]),
        *(f"factors of '{name}' (target_parameters)" for name in adapter.parameters),
        *(f"rows of its own for tokens ('{name}')" for name in adapter.copies),
        *(f"'{name}' trained whole" for name in _shared(adapter)),
    ]
    if beside:
        raise AdapterError(
            f"'{adapter.called}' has {beside[0]}, and models are run here with an adapter's layers "
            "and head alone: write it into its base with 'orthomerge merge --save-as full' and "
            "score that model, or train it without."
        )


def head_of(adapter: Adapter) -> Mapping[str, Tensor]:
    """The head of an adapter's task, which a merge keeps in a file of its own."""
    return _chosen(adapter, head=True)


def _shared(adapter: Adapter) -> Mapping[str, Tensor]:
    return _chosen(adapter, head=False)


def _chosen(adapter: Adapter, *, head: bool) -> Mapping[str, Tensor]:
    names = {n: n for n in adapter.modules if is_head(n, adapter) == head}
    return renamed_tensors(adapter.modules, names)


def check_heads(adapters: Sequence[Adapter], policy: str) -> None:
    """Refuse whole tensors that cannot be treated as the user asks, before any work.

    Raises:
        AdapterError: heads though they are refused; shapes that differ where there is room for
            one; parts of the model with different values that are not to be averaged; a part that
            one adapter trained whole and another has an update for.
    """
    if policy == "refuse":
        for adapter in adapters:
            if adapter.modules:
                raise AdapterError(
                    f"'{adapter.called}' carries '{next(iter(adapter.modules))}' beside its LoRA "
                    "layers: keep such heads apart with --heads keep, or average them."
                )
    average = policy == "average"
    trained = [(a, a.modules if average else _shared(a)) for a in adapters]
    copies = [(a, a.copies) for a in adapters]
    _require_equal_shapes([*trained, *copies])
    if not average:
        _require_agreement(trained, "was trained whole")
        _require_agreement(copies, "comes with added tokens, or of two base models,")
    for owner, tensors in trained:
        for name in tensors:
            layer = name.rpartition(".")[0]
            for other in adapters:
                if layer in other.shapes:
                    raise AdapterError(
                        f"'{layer}' was trained whole in '{owner.called}' and has an update in "
                        f"'{other.called}', and a layer can have one of the two: merge adapters "
                        "that do the same with it."
                    )


def _require_equal_shapes(owned: Sequence[tuple[Adapter, Mapping[str, Tensor]]]) -> None:
    seen: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for adapter, tensors in owned:
        for name, shape in shapes_of(tensors).items():
            known, expected = seen.setdefault(name, (adapter, shape))
            if shape != expected:
                hint = (
                    "use --heads keep"
                    if is_head(name, adapter)
                    else "add the same tokens to the base before each is trained"
                )
                raise AdapterError(
                    f"'{name}' is {list(expected)} in '{known.called}' and {list(shape)} in "
                    f"'{adapter.called}', so it cannot be averaged or shared: {hint}."
                )


def _require_agreement(owned: Sequence[tuple[Adapter, Mapping[str, Tensor]]], how: str) -> None:
    seen: dict[str, tuple[Adapter, Mapping[str, Tensor]]] = {}
    for adapter, tensors in owned:
        for name in tensors:
            first, theirs = seen.setdefault(name, (adapter, tensors))
            if first is not adapter and not _same(theirs[name], tensors[name]):
                raise AdapterError(
                    f"'{name}' {how} in '{first.called}' and '{adapter.called}' with different "
                    "values, and a merge has room for one: take the mean with --heads average "
                    "(heads='average'), or merge adapters that leave it alone."
                )


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, but for the rounding of the smaller of two dtypes."""
    if one.dtype == other.dtype or not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other)
    coarse = max(torch.finfo(t.dtype).eps for t in (one, other))
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=coarse, atol=1e-7
    )


def whole_tensors(
    adapters: Sequence[Adapter], policy: str, *, room_for_head: bool = False
) -> Whole:
    """What a merge itself holds of the adapters' whole tensors; `check_heads` has seen them.

    Parts of the model are in it, and heads where they are averaged. With `room_for_head` so is the
    head that one adapter has, or on which all agree.
    """
    average = policy == "average"
    heads = [head for a in adapters if (head := head_of(a))]
    one = room_for_head and all(_agree(heads[0], other) for other in heads[1:])
    with_head = bool(heads) and (average or one)
    found = [_shared(a) for a in adapters] + (heads if with_head else [])
    modules = _Joined(found, average=average)
    copies = _Joined([a.copies for a in adapters], average=average, without=modules.keys())
    return Whole(modules, copies, with_head)


def _agree(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


class _Joined(Mapping[str, Tensor]):
    """Tensors of several mappings, each worked out when it is asked for.

    The one of the first mapping that has it, or the plain mean over all that have.
    """

    def __init__(
        self,
        mappings: Sequence[Mapping[str, Tensor]],
        *,
        average: bool,
        without: Collection[str] = (),
    ) -> None:
        self._owners: dict[str, list[Mapping[str, Tensor]]] = {}
        for mapping in mappings:
            for name in mapping:
                if name not in without:
                    self._owners.setdefault(name, []).append(mapping)
        self._average = average

    def __getitem__(self, name: str) -> Tensor:
        owners = self._owners[name]
        first = owners[0][name]
        if not self._average or len(owners) == 1 or not first.is_floating_point():
            return first
        total = sum((m[name].double() for m in owners[1:]), start=first.double())
        return (total / len(owners)).to(first.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def label_count(shapes: Mapping[str, tuple[int, ...]], task_type: str | None) -> int | None:
    """How many labels a classifier's head distinguishes: its narrowest layer is the last."""
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    rows = [s[0] for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2]
    return min(rows, default=None)


def saved_modules(adapters: Sequence[Adapter], modules: Mapping[str, Tensor]) -> list[str] | None:
    """What PEFT's `modules_to_save` must say so that these modules are loaded."""
    named = {name for a in adapters for name in a.config.get("modules_to_save") or ()}
    there = {part for name in modules for part in name.split(".")}
    dotted = {n for n in named if "." in n and any(f"{n}." in f"{name}." for name in modules)}
    return sorted((named & there) | dotted) or None


def described_head(name: str, adapter: Adapter) -> dict[str, Any] | None:
    """The name of a head's file and how many labels it distinguishes, None where there is none."""
    shapes = shapes_of(head_of(adapter))
    if not shapes:
        return None
    return {"name": slug(name), "labels": label_count(shapes, adapter.config.get("task_type"))}

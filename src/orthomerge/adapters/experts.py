"""The experts of one tensor as one layer each: what PEFT's `target_parameters` adapts.

Transformers 5 keeps the experts of a mixture as one tensor, `[experts, ...]`. PEFT keeps their
factors in one pair: A `[experts · rank, d_in]` holds expert after expert, B `[d_out, rank ·
experts]` for every rank one expert after the other. The update of expert e is `s B_e A_e`, as any
layer's is. Where a module has several such tensors, PEFT wraps it once for each: the first tensor
of the module is the innermost, under `base_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors

WRAPPED = ".base_layer"
_WRAPPERS = re.compile(rf"({re.escape(WRAPPED)})+$")
# The order in which every class of Transformers makes the tensors of its experts.
_ORDER = ("gate_up_proj", "up_proj", "down_proj")


def of_older_layout(version: str) -> bool:
    """Whether a version of PEFT took every tensor of experts for `[experts, d_in, d_out]`."""
    said = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return said is not None and tuple(map(int, said.groups())) < (0, 19, 1)


def expert_layers(parameter: str, count: int) -> list[str]:
    """The layers of a tensor: one per expert, `experts.down_proj.0`; of a matrix its module."""
    if count == 1:
        return [parameter.removesuffix(".weight")]
    return [f"{parameter}.{expert}" for expert in range(count)]


def place_of(layer: str, parameters: Mapping[str, int]) -> tuple[str, int | None]:
    """The tensor that a layer is of, and its number there where it is an expert."""
    parameter, _, number = layer.rpartition(".")
    if parameters.get(parameter, 1) > 1 and number.isdigit():
        return parameter, int(number)
    return f"{layer}.weight", None


def layer_at(tensor: str, expert: int | None) -> str:
    """The layer of a place: `place_of` the other way."""
    return tensor.removesuffix(".weight") if expert is None else f"{tensor}.{expert}"


def tensor_of(wrapped: str, leaf: str) -> str:
    """The tensor that PEFT's wrapper of a module adapts, by the wrapper's name."""
    return f"{_WRAPPERS.sub('', wrapped)}.{leaf}"


def parameters_of(
    names: Iterable[str], targets: Collection[str], plain: Collection[str], where: str
) -> dict[str, str]:
    """Which tensor a pair of factors is of, by the name that the pair has in the file.

    `targets` are the `target_parameters`; `plain` the names whose factors have one rank alone,
    which may be of ordinary layers. Those, and names of no target, are left out.

    Raises:
        AdapterError: pairs of a module that its targets do not explain.
    """
    pairs: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):  # the innermost first
        pairs.setdefault(_WRAPPERS.sub("", name), []).append(name)
    found: dict[str, str] = {}
    for module, held in pairs.items():
        owners: dict[str, set[str]] = {}
        for owner, _, leaf in (target.rpartition(".") for target in targets):
            if not owner or f".{module}".endswith(f".{owner}"):
                owners.setdefault(leaf, set()).add(owner)
        only_named_bare = not any(owner for named in owners.values() for owner in named)
        if held == [module] and (not owners or (only_named_bare and module in plain)):
            continue
        expected = [module + WRAPPED * depth for depth in reversed(range(len(owners)))]
        if held != expected:
            raise AdapterError(
                f"'{where}' holds {len(held)} pairs of factors for '{module}', of which "
                f"target_parameters names {sorted(owners) or 'nothing'}: save it again with "
                "save_pretrained."
            )
        leaves = in_order(owners, where)
        found |= {name: f"{module}.{leaf}" for name, leaf in zip(held, leaves, strict=True)}
    return found


def in_order(leaves: Collection[str], where: str) -> list[str]:
    """The tensors of one module in the order of its class, by their last names.

    Raises:
        AdapterError: several, and one whose place is not known.
    """
    unknown = sorted(leaf for leaf in leaves if leaf not in _ORDER)
    if unknown and len(leaves) > 1:
        raise AdapterError(
            f"'{where}' adapts {', '.join(sorted(leaves))} of one module, and in which order PEFT "
            f"keeps '{unknown[0]}' is not known here: train an adapter for each."
        )
    return unknown or [leaf for leaf in _ORDER if leaf in leaves]


def wrapped_name(parameter: str, parameters: Collection[str], where: str) -> str:
    """What PEFT calls a tensor's pair of factors where all of `parameters` are adapted."""
    module, _, leaf = parameter.rpartition(".")
    beside = [p.rpartition(".") for p in parameters]
    leaves = in_order([name for owner, _, name in beside if owner == module], where)
    return module + WRAPPED * (len(leaves) - 1 - leaves.index(leaf))


def packed(
    experts: Sequence[LoraFactors],
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "d_out columns"], int]:
    """The factors of all experts as PEFT keeps them, the scaling in B, and their one rank.

    PEFT has one rank for all: those of a lower rank are filled up with zeros.
    """
    rank = max(factors.rank for factors in experts)
    A = [pad(f.A, [0, 0, 0, rank - f.rank]) for f in experts]
    B = [pad(f.B * f.scaling, [0, rank - f.rank]) for f in experts]
    return torch.cat(A), torch.stack(B, dim=-1).flatten(1), rank


def split(
    A: Float[Tensor, "rows d_in"], B: Float[Tensor, "d_out columns"], scaling: float, count: int
) -> list[LoraFactors]:
    """The factors of each expert: `packed` the other way."""
    parts = A.chunk(count)
    return [LoraFactors(a, unpacked(B, i, count), scaling) for i, a in enumerate(parts)]


def unpacked(
    B: Float[Tensor, "d_out columns"], expert: int, count: int
) -> Float[Tensor, "d_out rank"]:
    """One expert's part of B."""
    return B.reshape(len(B), -1, count)[:, :, expert].contiguous()

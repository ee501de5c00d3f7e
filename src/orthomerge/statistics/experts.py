"""The experts of a mixture as layers: which a model has, and what each of them reads.

Transformers runs experts that it keeps as one tensor by one rule (`use_experts_implementation`):
`gate_up_proj` or `up_proj` reads the hidden states that the router sent to the expert, `down_proj`
what the expert makes of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

_FIRST, _SECOND = ("gate_up_proj", "up_proj"), "down_proj"
_RULE = ("is_transposed", "has_gate", "has_bias")


class Expert(NamedTuple):
    """One expert of a tensor: the module that holds it, the tensor's last name, its number."""

    module: nn.Module
    leaf: str
    number: int

    @property
    def width(self) -> int:
        """Its inputs."""
        return self._shape[1]

    @property
    def outputs(self) -> int:
        """Its outputs."""
        return self._shape[0]

    @property
    def reads_activations(self) -> bool:
        """Whether it reads what the expert itself made, not hidden states."""
        return self.leaf == _SECOND

    @property
    def _shape(self) -> tuple[int, int]:
        _, first, second = cast(Any, self.module).get_parameter(self.leaf).shape
        return (second, first) if cast(Any, self.module).is_transposed else (first, second)


def expert_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str, int]]:
    """The tensors of experts by name, each with its module, its last name and how many it holds."""
    found: dict[str, tuple[nn.Module, str, int]] = {}
    for path, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        own = dict(cast(Iterable[tuple[str, Tensor]], module.named_parameters(recurse=False)))
        if not all(hasattr(module, name) for name in _RULE) or _SECOND not in own:
            continue
        for leaf in (*_FIRST, _SECOND):
            if leaf in own and own[leaf].ndim == 3:
                name = f"{path.replace('.base_layer', '')}.{leaf}"
                found[name] = module, leaf, len(own[leaf])
    return found


def experts_of(name: str, module: nn.Module, leaf: str, count: int) -> dict[str, Expert]:
    """The layers of a tensor of experts."""
    return {f"{name}.{i}": Expert(module, leaf, i) for i in range(count)}


def inputs_of(
    experts: Iterable[tuple[str, Expert]],
    hidden: Float[Tensor, "tokens d"],
    routed: Int[Tensor, "tokens k"],
) -> Iterator[tuple[str, Int[Tensor, " rows"], Float[Tensor, "rows d_in"]]]:
    """What each expert reads in a forward pass: the tokens that reached it, and its input rows."""
    for name, expert in experts:
        places = (routed == expert.number).any(dim=-1).nonzero()[:, 0].to(hidden.device)
        rows = hidden.index_select(0, places)
        if expert.reads_activations:
            rows = _activations(expert.module, rows, expert.number)
        yield name, places, rows


def _activations(module: Any, rows: Tensor, expert: int) -> Tensor:
    """What an expert makes of its rows before its `down_proj`: Transformers' own rule."""
    leaf = next(name for name in _FIRST if hasattr(module, name))
    weight = getattr(module, leaf)[expert]
    bias = getattr(module, f"{leaf}_bias")[expert] if module.has_bias else None
    found = linear(rows, weight.T if module.is_transposed else weight, bias)
    return module._apply_gate(found) if module.has_gate else module.act_fn(found)

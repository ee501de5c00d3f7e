"""What training may do with `A`: held, or projected out of the others' dominant directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from orthomerge import linalg
from orthomerge.adapters.experts import expert_layers, of_older_layout, tensor_of
from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.io.documents import parse_json
from orthomerge.io.tensors import write_tensors
from orthomerge.statistics import backbone
from orthomerge.subspace import project_rows_out

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
EXCLUDED = "kept_out.safetensors"  # its name in version 0.1, which folders still have
_ENTRY = "directions"
PROJECTED = (
    "layer '{}' is an expert, and the constraint 'project' covers no experts: choose 'init', "
    "'freeze' or 'penalty', or leave them out of the targets."
)


class _Held(NamedTuple):
    weight: Tensor
    bias: None = None


class ExpertLora:
    """One expert of PEFT's layer for a tensor of experts, with what a LoRA layer has.

    Its factors are views of those that PEFT trains for all experts; `A` and `B` give the parameter
    that holds them and how to view it.
    """

    def __init__(self, module: Any, number: int) -> None:
        self._module, self._number = module, number
        self.scaling: Mapping[str, float] = module.scaling
        self.lora_variant: Mapping[str, Any] = {}

    def A(self, adapter: str) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
        """The parameter, and its rows."""
        count, number = int(self._module.num_experts), self._number
        return self._module.lora_A[adapter].weight, lambda held: held.chunk(count)[number]

    def B(self, adapter: str) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
        """The parameter, and its columns."""
        count, number = int(self._module.num_experts), self._number
        parameter = self._module.lora_B[adapter].weight
        return parameter, lambda held: held.view(len(held), -1, count)[:, :, number]

    @property
    def lora_A(self) -> Mapping[str, _Held]:
        """The present values of A, by adapter."""
        return {name: _seen(self.A(name)) for name in self._module.lora_A}

    @property
    def lora_B(self) -> Mapping[str, _Held]:
        """The present values of B, by adapter."""
        return {name: _seen(self.B(name)) for name in self._module.lora_B}

    @property
    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The base's weight of this expert."""
        base = self._module.get_base_layer()
        weight = getattr(base, self._module.parameter_name)[self._number].detach()
        return weight.T if getattr(base, "is_transposed", False) else weight


def _seen(factor: tuple[nn.Parameter, Callable[[Tensor], Tensor]]) -> _Held:
    parameter, view = factor
    return _Held(view(parameter.data))


def lora_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Any]:
    """The LoRA layers of a PEFT model, by their name in the backbone; each expert is one.

    Raises:
        AdapterError: the model has no LoRA layer, or experts under a PEFT before 0.19.1.
    """
    from peft import __version__
    from peft.tuners.lora import ParamWrapper

    found: dict[str, Any] = {}
    for name, module in lora_modules(model, adapter).items():
        count = module.num_experts if isinstance(module, ParamWrapper) else 1
        if count == 1:
            found[name] = module
            continue
        if of_older_layout(__version__):
            raise AdapterError(
                f"layer '{name}' adapts experts, which are trained here with PEFT 0.19.1 or later: "
                f"this is PEFT {__version__}; update it."
            )
        layers = expert_layers(tensor_of(name, module.parameter_name), count)
        found |= {layer: ExpertLora(module, i) for i, layer in enumerate(layers)}
    return found


def lora_modules(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Any]:
    """PEFT's LoRA modules, by their name in the backbone.

    Raises:
        AdapterError: the model has no LoRA layer.
    """
    from peft.tuners.lora import LoraLayer

    named = cast(Iterable[tuple[str, Any]], backbone(model).named_modules())
    found = {
        name: module
        for name, module in named
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    if not found:
        raise AdapterError(
            "the model has no LoRA layer: wrap it with peft.get_peft_model(model, LoraConfig(...))."
        )
    return found


def freeze_A(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Hold every `A` where it is; `B` and the head go on training."""
    for layer in lora_modules(peft_model, adapter_name).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)


def freeze_B(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Hold every `B` where it is; `A` and the head go on training.

    Raises:
        AdapterError: a `B` that is zero, from which nothing could be learnt (`orthonormal_B`).
    """
    for name, layer in lora_modules(peft_model, adapter_name).items():
        B = layer.lora_B[adapter_name].weight
        if not bool(B.any()):
            raise AdapterError(
                f"layer '{name}' starts with B at zero, so it can learn nothing with B held: give "
                "B a start first (orthonormal_B)."
            )
        B.requires_grad_(False)


class Directions(NamedTuple):
    """Orthonormal rows `D: [k, d_in]` by layer (named below the head).

    A projected `A` stays out of their span, or `within` it where that is the smaller set to name.
    """

    rows: Mapping[str, Float[Tensor, "k d_in"]]
    within: bool = False


class Projection:
    """`A ← A (I − P)`, `P = DᵀD` the projector on the directions `A` must stay out of.

    With `Directions.within` it is `A ← A P`: out of everything else. Attach it to any optimizer
    with `attach`, or call `apply` after each step; the projection is computed in float64, so that
    what is left of `A` on the wrong side is the rounding of its own type, below 1e-7 of its norm in
    float32, however long the training. O(rank · k · d_in) a layer.

    Raises:
        AdapterError: a LoRA layer without directions, or directions of another width or that are
            not orthonormal.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        excluded: Directions | Mapping[str, Float[Tensor, "k d_in"]],
        *,
        adapter_name: str = ADAPTER,
    ) -> None:
        from orthomerge.models.loading import exact_device

        directions = excluded if isinstance(excluded, Directions) else Directions(excluded)
        self._within = directions.within
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        wide: dict[int, Tensor] = {}
        for name, layer in lora_layers(peft_model, adapter_name).items():
            if isinstance(layer, ExpertLora):
                raise AdapterError(PROJECTED.format(name))
            A = layer.lora_A[adapter_name].weight
            if name not in directions.rows:
                raise AdapterError(
                    f"no directions to keep layer '{name}' out of: make the start with "
                    "--constraint project, for the same target modules."
                )
            rows = directions.rows[name]
            if rows.ndim != 2 or rows.shape[1] != A.shape[1]:
                raise AdapterError(
                    f"layer '{name}' has {A.shape[1]} inputs, the directions to keep it out of are "
                    f"{list(rows.shape)}: they belong to another model."
                )
            if id(rows) not in wide:  # layers that read one input share one tensor
                wide[id(rows)] = rows.to(exact_device(A.device), torch.float64)
                _require_orthonormal(wide[id(rows)], name)
            self._pairs.append((A, wide[id(rows)]))

    @torch.no_grad()
    def apply(self) -> None:
        """Project every `A`."""
        for A, rows in self._placed():
            A.copy_(self._projected(A.to(rows), rows))

    def _placed(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The pairs, each where its `A` is worked on by now: a Trainer moves the model late."""
        from orthomerge.models.loading import exact_device

        places = [exact_device(A.device) for A, _ in self._pairs]
        if any(place != rows.device for place, (_, rows) in zip(places, self._pairs, strict=True)):
            moved: dict[tuple[int, torch.device], Tensor] = {}
            for place, (_, rows) in zip(places, self._pairs, strict=True):
                moved.setdefault((id(rows), place), rows.to(place))
            self._pairs = [
                (A, moved[id(rows), place])
                for place, (A, rows) in zip(places, self._pairs, strict=True)
            ]
        return self._pairs

    def _projected(self, A: Tensor, rows: Tensor) -> Tensor:
        return (A @ rows.T) @ rows if self._within else project_rows_out(A, rows)

    @torch.no_grad()
    def violation(self) -> float:
        """The largest norm of any layer's `A` on the side it must stay out of: `‖A P‖_F`."""
        return max(
            float(linalg.vector_norm(A.to(rows) - self._projected(A.to(rows), rows)))
            for A, rows in self._placed()
        )

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Project after every step of `optimizer`, until the returned handle is removed."""

        def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.apply()

        self.apply()
        return optimizer.register_step_post_hook(after)


def _require_orthonormal(rows: Tensor, layer: str) -> None:
    """Refuse directions that no projector can be made of: a step would throw `A` about."""
    gap = rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
    if not float(gap.abs().max() if gap.numel() else 0.0) <= 1e-5:
        raise AdapterError(
            f"the directions to keep layer '{layer}' out of are not orthonormal: make the start "
            "again."
        )


def write_excluded(folder: Path, directions: Directions) -> None:
    """Directions by layer beside a start's weights, each distinct tensor once.

    Equal directions give equal bytes: safetensors keeps no order among several entries of metadata.
    """
    leads: dict[int, str] = {}
    layers = {name: leads.setdefault(id(rows), name) for name, rows in directions.rows.items()}
    tensors = {lead: directions.rows[lead].contiguous() for lead in set(layers.values())}
    about = json.dumps({"layers": layers, "within": directions.within})
    write_tensors(folder / EXCLUDED, tensors, {_ENTRY: about})


def read_excluded(folder: str | Path) -> Directions:
    """The directions that a start made for the constraint "project" carries.

    Raises:
        AdapterError: the start carries none, or a file that cannot be read.
    """
    with carried(folder, EXCLUDED, "project") as stream:
        about = _about(stream.metadata() or {})
        layers: dict[str, str] = about["layers"]
        held: dict[str, Tensor] = {lead: stream.get_tensor(lead) for lead in set(layers.values())}
        rows = {name: held[lead] for name, lead in layers.items()}
        return Directions(rows, within=bool(about["within"]))


@contextmanager
def carried(folder: str | Path, file: str, constraint: str) -> Generator[Any, None, None]:
    """A start's file of what its constraint is made of, to be read within the block.

    Raises:
        AdapterError: the start has no such file, or one that cannot be read.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise AdapterError(
            f"'{folder}' has no {file}, which the constraint '{constraint}' needs: make the start "
            f"with 'orthomerge init --constraint {constraint}'."
        )
    try:
        with cast(Any, safe_open(path, framework="pt")) as stream:
            yield stream
    except (
        SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, StatisticsError,
    ) as problem:  # fmt: skip
        raise AdapterError(
            f"'{path}' cannot be read ({problem}): make the start again."
        ) from problem


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    """Which tensor is whose; older files have an entry for each of the two things said."""
    if _ENTRY in metadata:
        return parse_json(metadata[_ENTRY])
    return {key: parse_json(metadata[key]) for key in ("layers", "within")}

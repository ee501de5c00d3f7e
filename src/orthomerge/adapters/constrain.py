"""What training may do with `A`: held, or projected out of the others' dominant directions."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
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


def lora_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Any]:
    """The LoRA layers of a PEFT model, by their name in the backbone.

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
    for layer in lora_layers(peft_model, adapter_name).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)


def freeze_B(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Hold every `B` where it is; `A` and the head go on training.

    Raises:
        AdapterError: a `B` that is zero, from which nothing could be learnt (`orthonormal_B`).
    """
    for name, layer in lora_layers(peft_model, adapter_name).items():
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

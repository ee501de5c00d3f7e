"""The penalty: what an update adds to the other tasks' outputs, charged for while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from orthomerge import linalg
from orthomerge.adapters.config import OsrmConfig, check_penalty
from orthomerge.adapters.constrain import ADAPTER, ExpertLora, carried, lora_layers
from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.io.documents import parse_json
from orthomerge.io.files import derive_seed
from orthomerge.io.tensors import write_tensors
from orthomerge.models.modules import is_transposed
from orthomerge.moments import Moment, RowMoment, SecondMoment, combine
from orthomerge.statistics import Statistics, backbone
from orthomerge.subspace import orthonormal_rows

PENALTY = "penalty.safetensors"
"""The file of a start that carries what the constraint "penalty" charges for."""
_ENTRY = "penalty"
# Starts of PEFT's that leave the base weight as it is, so that the update is `s B A`.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Rows of a weight that are worked on at a time.
_BLOCK = 4096


class Charge(NamedTuple):
    """What one layer's update is charged for: `s² tr(B A (S + ridge I) Aᵀ Bᵀ) / base`.

    `moment` is `S: [d_in, d_in]`, None for the identity alone; `base` is `tr(W S_other Wᵀ)`, the
    energy that the base model puts into the layer's output for the other tasks' inputs.
    """

    moment: Moment | None
    ridge: float
    base: float


@dataclass(frozen=True)
class Charges:
    """The charge of every adapted layer (named below the head), and the strength λ of all."""

    layers: Mapping[str, Charge]
    strength: float


def penalty_charges(
    peft_model: PeftModel,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None,
    config: OsrmConfig,
    *,
    adapter_name: str = ADAPTER,
) -> Charges:
    """Use before a training with the constraint "penalty": what each layer is charged for.

    `S_other` is the others' weighted mean moment (`config.weights`), `base = tr(W S_other Wᵀ)` is
    computed here, once. Layers that read one input share one moment. `config.penalty_moment` puts
    a control in the place of `S_other`, each of the same trace. O(d_out d_in²) per layer, or
    O(d_out d_in k) where the others' k rows are held.

    Raises:
        StatisticsError: no others, statistics of another model or granularity, or no own ones
            where the control "pooled" needs them.
        AdapterError: an adapter whose update is not `s B A` at linear layers.
    """
    if not others:
        raise StatisticsError("the constraint 'penalty' needs statistics of at least one other.")
    read = [Statistics.of(item) for item in others]
    mine = Statistics.of(own) if own is not None else None
    found: dict[str, Charge] = {}
    by_owner: dict[str, tuple[Moment, Moment | None, float]] = {}
    for name, layer in _plain_layers(peft_model, adapter_name).items():
        owner = read[0].layers.get(name, name)
        if owner not in by_owner:
            moments = [item.moment(name) for item in read]
            other = combine(moments, config.weights)
            ridge = config.isotropic_share * other.trace / other.dim
            charged = _charged(other, moments, mine, name, owner, config)
            if charged is None:
                ridge += other.trace / other.dim
            by_owner[owner] = (other, charged, ridge)
        other, charged, ridge = by_owner[owner]
        base = base_energy(_base_weight(layer), other)
        if base <= 0 < other.trace:
            raise AdapterError(
                f"layer '{name}' of the base model gives nothing for the other tasks' inputs, so "
                "no energy can be measured against it: leave it out of the target modules."
            )
        found[name] = Charge(charged, ridge, base)
    return Charges(found, config.strength)


def _charged(
    other: Moment,
    moments: Sequence[Moment],
    own: Statistics | None,
    layer: str,
    owner: str,
    config: OsrmConfig,
) -> Moment | None:
    """The others' moment, or the control in its place; None for the identity."""
    if config.penalty_moment == "others":
        return other
    if config.penalty_moment == "isotropic":
        return None
    if config.penalty_moment == "random":
        return _turned(other, derive_seed(config.seed, "penalty", owner, f"{other.trace:.6e}"))
    if own is None:
        raise StatisticsError("the control 'pooled' needs the task's own statistics: pass own=.")
    weights = list(config.weights or [1.0] * len(moments))
    weights.append(sum(weights) / len(weights))
    pooled = combine([*moments, own.moment(layer)], weights)
    return _scaled(pooled, other.trace / pooled.trace if pooled.trace else 1.0)


def _scaled(moment: Moment, by: float) -> Moment:
    """`by · S`, in the form it is held in."""
    factor = moment.factor
    if factor is not None:
        return RowMoment.from_factor(factor * by**0.5, moment.count, slack=None)
    return SecondMoment.from_matrix(moment.matrix * by, moment.count, slack=None)


def _turned(moment: Moment, seed: int) -> Moment:
    """A moment of the same eigenvalues along directions drawn uniformly."""
    factor = moment.factor
    few = factor is not None and factor.shape[0] < moment.dim
    values = linalg.eigh(moment.gram if few and moment.gram is not None else moment.matrix)[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(values), moment.dim, generator=generator, dtype=torch.float64)
    rows = orthonormal_rows(drawn.to(values.device)) * values.clamp_min(0.0).sqrt()[:, None]
    if few:
        return RowMoment.from_factor(rows, moment.count, slack=None)
    return SecondMoment.from_matrix(rows.T @ rows, moment.count, slack=None)


def _plain_layers(peft_model: PeftModel, adapter: str) -> dict[str, Any]:
    """The LoRA layers, every one with the update `s B A` of a linear layer.

    Raises:
        AdapterError: another update, an embedding, or a start that changed the base weight.
    """
    start = getattr(peft_model.peft_config[adapter], "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"the start '{start}' takes a part of the base weight into the adapter, so that "
            "'s B A' is not the update that the penalty charges for: use PEFT's default start, "
            "'eva', or 'orthomerge init'."
        )
    for name, module in cast(Iterable[tuple[str, Any]], backbone(peft_model).named_modules()):
        if isinstance(module, LoraLayer) and adapter in module.lora_embedding_A:
            raise AdapterError(
                f"'{name}' is an adapted embedding, which reads no features: the constraint "
                "'penalty' covers linear layers alone; leave it out of the target modules."
            )
    layers = lora_layers(peft_model, adapter)
    for name, layer in layers.items():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            raise AdapterError(
                f"layer '{name}' is a {kind} layer, whose update is not 's B A': the constraint "
                "'penalty' charges plain LoRA; train without use_dora and the like."
            )
        if A.ndim != 2 or B.ndim != 2 or type(layer).__name__ in _NOT_LINEAR:
            raise AdapterError(
                f"layer '{name}' ({type(layer).__name__}) is no linear layer: the constraint "
                "'penalty' covers linear layers alone; leave it out of the target modules."
            )
        if layer.lora_B[adapter].bias is not None:
            raise AdapterError(
                f"layer '{name}' has lora_bias=True, and the penalty does not see a bias: train "
                "without lora_bias."
            )
    return layers


_NOT_LINEAR = ("MultiheadAttention", "ParamWrapper")


def _base_weight(layer: Any) -> Float[Tensor, "d_out d_in"]:
    """The base layer's weight, dequantised where it is quantised."""
    if isinstance(layer, ExpertLora):
        return layer.base_weight
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).detach()
    return weight.T if is_transposed(base) else weight


def base_energy(weight: Float[Tensor, "d_out d_in"], moment: Moment) -> float:
    """`tr(W S Wᵀ)`, the energy of a layer's outputs; `‖W Rᵀ‖²_F` of rows `S = RᵀR`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factor = moment.factor
    held = (moment.matrix if factor is None else factor).to(dtype).to(weight.device)
    total = 0.0
    for rows in cast(Sequence[Tensor], weight.split(_BLOCK)):
        block = rows.to(dtype)
        if factor is None:
            total += float(((block @ held) * block).sum())
        else:
            total += float((block @ held.T).square().sum())
    return total


class _Factor(NamedTuple):
    """A or B: the parameter, and the part of it where it holds those of several experts."""

    parameter: nn.Parameter
    part: Callable[[Tensor], Tensor] | None = None

    def value(self, like: _Factor, dtype: torch.dtype) -> Tensor:
        held: Tensor = self.parameter
        part = held if self.part is None else self.part(held)
        return part.to(device=like.parameter.device, dtype=dtype)

    def add(self, gradient: Tensor) -> None:
        """Add to `.grad` of a parameter that trains."""
        held = self.parameter
        if not held.requires_grad:
            return
        found = gradient.to(held)
        if held.grad is None and self.part is None:
            held.grad = found
            return
        if held.grad is None:
            held.grad = torch.zeros_like(held)
        (held.grad if self.part is None else self.part(held.grad)).add_(found)


def _factors(layer: Any, adapter: str) -> tuple[_Factor, _Factor]:
    if isinstance(layer, ExpertLora):
        return _Factor(*layer.A(adapter)), _Factor(*layer.B(adapter))
    return _Factor(layer.lora_A[adapter].weight), _Factor(layer.lora_B[adapter].weight)


@dataclass
class _Group:
    """Layers of one moment: their factors, and `2 s² / (base L)` of each."""

    moment: Tensor | None
    rows: bool
    ridge: float
    pairs: list[tuple[_Factor, _Factor, float]]

    def seen(self, wide: Tensor) -> Tensor:
        """`A (S + ridge I)`."""
        found = self.ridge * wide if self.ridge else None
        if self.moment is not None:
            product = wide @ self.moment.T @ self.moment if self.rows else wide @ self.moment
            found = product if found is None else found + product
        return torch.zeros_like(wide) if found is None else found


class Penalty:
    """`λ · mean over layers of s² tr(B A S Aᵀ Bᵀ) / base`, for a training loop of your own.

    Calling it gives the scalar with autograd, to be added to a loss. `add_gradients` adds the same
    gradient to `.grad` in closed form, `∂P/∂A = 2 s² BᵀB A S / base` and
    `∂P/∂B = 2 s² B (A S Aᵀ) / base`, which any optimizer then steps along; where A or B is held it
    gets none. Computed in float32, or in the type of the factors where that is wider. O(r d_in²) a
    layer and step, O(r k d_in) where k rows are held; no other d_in × d_in matrix is formed.

    Raises:
        AdapterError: a LoRA layer without a charge, or one of another width.
    """

    def __init__(
        self, peft_model: PeftModel, charges: Charges, *, adapter_name: str = ADAPTER
    ) -> None:
        self.strength = charges.strength
        self._groups: list[_Group] = []
        layers = _plain_layers(peft_model, adapter_name)
        by_moment: dict[tuple[int, float, torch.dtype], _Group] = {}
        for name, layer in layers.items():
            A = layer.lora_A[adapter_name].weight
            if name not in charges.layers:
                raise AdapterError(
                    f"nothing says what layer '{name}' is charged for: make the start with "
                    "--constraint penalty, for the same target modules."
                )
            moment, ridge, base = charges.layers[name]
            if moment is not None and moment.dim != A.shape[1]:
                raise AdapterError(
                    f"layer '{name}' has {A.shape[1]} inputs, the statistics of its penalty "
                    f"{moment.dim}: they belong to another model."
                )
            dtype = torch.promote_types(A.dtype, torch.float32)
            key = (id(moment), ridge, dtype)
            if key not in by_moment:
                factor = None if moment is None else moment.factor
                held = None if moment is None else moment.matrix if factor is None else factor
                by_moment[key] = _Group(
                    None if held is None else held.to(dtype), factor is not None, ridge, []
                )
            share = layer.scaling[adapter_name] ** 2 / base / len(layers) if base > 0 else 0.0
            by_moment[key].pairs.append((*_factors(layer, adapter_name), share))
        self._groups = list(by_moment.values())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every A and B that it looks at."""
        pairs = [pair for group in self._groups for pair in group.pairs]
        return list(dict.fromkeys(f.parameter for A, B, _ in pairs for f in (A, B)))

    def __call__(self) -> Float[Tensor, ""]:
        """`λ · mean P`, differentiable."""
        return self.strength * self._sum(None)

    @torch.no_grad()
    def value(self) -> Float[Tensor, ""]:
        """The mean of P over layers, without λ."""
        return self._sum(None)

    @torch.no_grad()
    def add_gradients(self, scale: float = 1.0) -> Float[Tensor, ""]:
        """Add the gradient of `scale · λ · mean P` to `.grad`; returns the mean of P.

        Call it once per optimizer step, after or before the backward passes of the step.
        """
        return self._sum(2.0 * scale * self.strength)

    def _sum(self, strength: float | None) -> Tensor:
        """The mean of P; with a `strength` gradients are added on the way."""
        total: Tensor | None = None
        for group in self._groups:
            first = group.pairs[0][0].parameter
            with torch.autocast(first.device.type, enabled=False):
                for part in self._of_group(group, first.device, strength):
                    total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total

    def _of_group(
        self, group: _Group, device: torch.device, strength: float | None
    ) -> Iterable[Tensor]:
        if group.moment is not None and group.moment.device != device:
            group.moment = group.moment.to(device)  # a Trainer moves the model late
        first = group.pairs[0][0]
        dtype = torch.promote_types(first.parameter.dtype, torch.float32)
        As = [A.value(first, dtype) for A, _, _ in group.pairs]
        wide = As[0] if len(As) == 1 else torch.cat(As)
        seen = cast(Sequence[Tensor], group.seen(wide).split([len(A) for A in As]))
        for (A, B, share), rows, AS in zip(group.pairs, As, seen, strict=True):
            b = B.value(first, dtype)
            BB, inner = b.T @ b, AS @ rows.T
            yield share * (BB * inner).sum()
            if strength is not None:
                A.add(strength * share * (BB @ AS))
                B.add(strength * share * (b @ inner))


def write_penalty(folder: Path, charges: Charges) -> None:
    """What a penalty charges for beside a start's weights; each distinct moment once.

    Rows are written turned into a triangle, so that none is there as it was seen.
    """
    leads: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, (moment, ridge, base) in charges.layers.items():
        lead = None if moment is None else leads.setdefault(id(moment), name)
        if moment is not None and lead == name:
            held, _ = moment.state()
            (kind, tensor) = next(iter(held.items()))
            if kind == "mean":
                kind, tensor = "factor", tensor[None]
            tensors[f"{name}:{kind}"] = tensor.detach().float().cpu().contiguous()
        layers[name] = [lead, ridge, base]
    about = json.dumps({"layers": layers, "strength": charges.strength})
    write_tensors(folder / PENALTY, tensors, {_ENTRY: about})


def read_penalty(folder: str | Path, strength: float | None = None) -> Charges:
    """What a start made for the constraint "penalty" carries; with another `strength`, if given.

    Raises:
        AdapterError: the start carries none, or a file that cannot be read.
        RecipeError: a strength that is no number from 0 up.
    """
    with carried(folder, PENALTY, "penalty") as stream:
        header: dict[str, str] = stream.metadata() or {}
        about: dict[str, Any] = parse_json(header[_ENTRY])
        keys: list[str] = list(stream.keys())
        moments = {
            key.rpartition(":")[0]: _moment(key.rpartition(":")[2], stream.get_tensor(key))
            for key in keys
        }
        layers = {
            str(name): Charge(
                None if lead is None else moments[lead], _number(ridge), _number(base)
            )
            for name, (lead, ridge, base) in about["layers"].items()
        }
        charges = Charges(layers, _number(about["strength"]))
    if strength is None:
        return charges
    check_penalty(strength)
    return replace(charges, strength=strength)


def _moment(kind: str, tensor: Tensor) -> Moment:
    found = SecondMoment if kind == "matrix" else RowMoment
    fields = {"count": 1, "exact": True, "slack": None}
    return found.restore({kind: tensor.double()}, fields)


def _number(value: Any) -> float:
    """A finite number, not negative."""
    found = float(value)
    if not 0 <= found < float("inf"):
        raise ValueError(f"{value} is not a number from 0 up")
    return found

"""Hooks that stream the inputs of chosen layers into moments, and leave no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from orthomerge.errors import StatisticsError, unknown_name
from orthomerge.moments import MeanMoment, Moment, Representation, choose
from orthomerge.statistics.experts import Expert, inputs_of

GRANULARITIES = ("token", "sample", "task_mean")


class _AllRead(BaseException):
    """Ends a forward pass whose rest is of no use; no error, so nothing on the way may catch it."""


# Device, address, shape, strides and version of a tensor.
_Identity = tuple[torch.device, int, torch.Size, tuple[int, ...], int]


class _Input:
    """One distinct layer input: the layers that read it, and the moment it feeds."""

    def __init__(self, lead: str, width: int) -> None:
        self.lead = lead
        self.layers = [lead]
        self.width = width
        self.source = 0
        self.moment: Moment | None = None
        # Held while layers of one forward pass may still read it, to see that it is the same one.
        self.current: tuple[Tensor, _Identity] | None = None
        self.waiting = 0


def _identity(features: Tensor) -> _Identity:
    """What distinguishes one live tensor from another, whatever views were made of it.

    The version counts writes in place: a residual stream added onto is not what it was before.
    """
    version = 0 if features.is_inference() else features._version
    return features.device, features.data_ptr(), features.shape, features.stride(), version


def _outputs(layer: nn.Module) -> int:
    base = getattr(layer, "base_layer", layer)
    width = getattr(base, "out_features", None) or getattr(base, "nf", None)
    return int(width) if width else 0


class FeatureCollector:
    """Second moments of the inputs of `layers`, updated by running the model under `watch`.

    Layers that read the very same tensor in a forward pass (q, k and v; gate and up; every k and v
    of a cross-attention) share one moment. Which do is found under `discover`, on a sample small
    enough to hold all its features, and checked in every pass.

    An expert has a moment of its own. What it would read of a token that the router sent to others
    counts as zero: `S = Σ_routed h hᵀ / n` over all n real tokens.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module | Expert],
        granularity: str = "token",
        representation: Representation | None = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise unknown_name("granularity", granularity, GRANULARITIES, error=StatisticsError)
        self.granularity = granularity
        self._representation = (representation or Representation()).check()
        self._layers = {n: m for n, m in layers.items() if not isinstance(m, Expert)}
        self._experts: dict[nn.Module, list[tuple[str, Expert]]] = {}
        for name, expert in layers.items():
            if isinstance(expert, Expert):
                self._experts.setdefault(expert.module, []).append((name, expert))
        self._inputs: dict[str, _Input] = {}
        self._kinds: dict[str, str] = {}
        self._masks: list[Bool[Tensor, "batch length"]] = []
        self._real: dict[tuple[int, torch.device], Tensor] = {}
        self._draw = 0

    @property
    def discovered(self) -> bool:
        """Whether the distinct inputs are known."""
        return bool(self._inputs)

    @contextmanager
    def discover(self, masks: Sequence[Tensor | None]) -> Generator[None, None, None]:
        """Install hooks for one small forward pass that finds which layers read one tensor.

        `masks` are those of that pass, of different lengths where there are two, so that what
        reads the encoder is distinguished from what reads the decoder.

        Raises:
            StatisticsError: a layer that does not run, or runs twice.
        """
        held: dict[str, tuple[Tensor, _Identity]] = {}

        def keep(name: str, features: Tensor) -> None:
            held[name] = features.detach(), _identity(features)

        with self._hooks(keep):
            yield
        shapes = [m.shape for m in masks if m is not None]
        known: dict[_Identity, _Input] = {}
        for name, (features, key) in held.items():
            if key in known:
                known[key].layers.append(name)
            else:
                known[key] = _Input(name, features.shape[-1])
                fits = [i for i, shape in enumerate(shapes) if _fits(features, shape)]
                known[key].source = fits[0] if fits else 0
            self._inputs[name] = known[key]
        outputs = {
            i.lead: (i.width, sum(_outputs(self._layers[n]) for n in i.layers))
            for i in known.values()
        }
        for name, expert in (pair for group in self._experts.values() for pair in group):
            self._inputs[name] = _Input(name, expert.width)
            outputs[name] = expert.width, expert.outputs
        self._kinds = choose(outputs, self._representation)

    @contextmanager
    def watch(
        self, masks: Sequence[Tensor | None], draw: int = 0, *, stop: bool = False
    ) -> Generator[None, None, None]:
        """Hooks on for one forward pass; `masks` mark real positions, 1 or True, padding 0.

        `draw` is the number of the batch, by which a representation that samples draws. With `stop`
        the pass, and with it the block, ends when the last layer has been read: what the model
        would still compute serves nobody. Hooks are gone and held activations dropped when the
        block ends, however it ends.

        Raises:
            StatisticsError: a layer that does not run, or runs twice; rows with NaN or infinity;
                an input that no mask fits.
        """
        self._masks = [m.bool() for m in masks if m is not None]
        self._draw = draw
        try:
            with self._hooks(self._keep, self._take_experts, stop), suppress(_AllRead):
                yield
        finally:
            self._masks, self._real = [], {}
            for item in self._inputs.values():
                item.current = None

    @contextmanager
    def _hooks(
        self,
        keep: Callable[[str, Tensor], None],
        take_experts: Callable[[Sequence[tuple[str, Expert]], Tensor, Tensor], None] | None = None,
        stop: bool = False,
    ) -> Generator[None, None, None]:
        ran: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name in ran:
                    raise StatisticsError(
                        f"layer '{name}' ran twice in one forward pass: weights shared between "
                        "depths are not supported; leave it out of the targets."
                    )
                ran.add(name)
                given = [*args, *kwargs.values()]
                if name not in experts:
                    keep(name, given[0])
                elif take_experts is not None:
                    take_experts(experts[name], given[0], given[1])
                if stop and len(ran) == len(modules):
                    raise _AllRead

            return read

        experts = {group[0][0]: group for group in self._experts.values()}
        modules = self._layers | {name: group[0][1].module for name, group in experts.items()}
        handles = [
            module.register_forward_pre_hook(hook(name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missing = [n for n in modules if n not in ran]
        if missing:
            raise StatisticsError(
                f"layer '{missing[0]}' did not run on this data: leave it out of the targets."
            )

    def _keep(self, name: str, features: Tensor) -> None:
        item = self._inputs[name]
        if name == item.lead:
            self._take(item, features)
            item.waiting = len(item.layers) - 1
            item.current = (features, _identity(features)) if item.waiting else None
            return
        if item.current is None or item.current[1] != _identity(features):
            raise StatisticsError(
                f"layers '{item.lead}' and '{name}' read one tensor in the first batch and "
                "different ones now: name them in separate runs."
            )
        item.waiting -= 1
        if not item.waiting:
            item.current = None

    def _mask_for(self, item: _Input, features: Tensor) -> Tensor | None:
        """The mask of an input's positions; None where it has none: a pooled row a sample."""
        if not self._masks:
            return None
        mask = self._masks[min(item.source, len(self._masks) - 1)]
        fitting = [m for m in (mask, *self._masks) if _fits(features, m.shape)]
        if fitting:
            return fitting[0]
        if features.ndim == 2 and features.shape[0] == mask.shape[0]:
            return None
        raise StatisticsError(
            f"layer '{item.lead}' reads {list(features.shape)}, which no attention mask fits "
            f"({[list(m.shape) for m in self._masks]}): padding cannot be found; leave it out of "
            "the targets."
        )

    def _take_experts(
        self, experts: Sequence[tuple[str, Expert]], hidden: Tensor, routed: Tensor
    ) -> None:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        mask = self._mask_for(self._inputs[experts[0][0]], hidden)
        shape = (len(hidden), 1) if mask is None else tuple(mask.shape)
        real = torch.ones(shape, dtype=torch.bool) if mask is None else mask
        flat, lengths = real.reshape(-1).to(hidden.device), real.sum(dim=1).to(hidden.device)
        routed = routed.reshape(len(hidden), -1).masked_fill(~flat[:, None], -1)
        for name, places, rows in inputs_of(experts, hidden, routed):
            if self.granularity == "sample":
                sums = torch.zeros(shape[0], rows.shape[1], dtype=torch.float64)
                sums = sums.to(rows.device).index_add_(0, places // shape[1], rows.double())
                rows = sums[lengths > 0] / lengths[lengths > 0, None]
                self._add(self._inputs[name], rows)
            else:
                self._add(self._inputs[name], rows, zeros=int(flat.sum()) - len(rows))

    def _take(self, item: _Input, features: Float[Tensor, "batch *length d_in"]) -> None:
        mask = self._mask_for(item, features)
        if mask is not None and features.ndim == 2:
            features = features.view(*mask.shape, item.width)
        if self.granularity == "sample" and features.ndim >= 3:
            wide = features.double()
            if mask is None:
                rows = wide.flatten(1, -2).mean(dim=1)
            else:
                mask = mask.to(wide.device)
                weights = mask.to(wide)
                real = weights.sum(dim=1)
                rows = torch.where(mask[..., None], wide, 0.0).sum(dim=1) / real[:, None]
                rows = rows[real > 0]
        else:
            rows = features.reshape(-1, item.width)
            if mask is not None:
                rows = self._real_rows(rows, mask)
        self._add(item, rows)

    def _add(self, item: _Input, rows: Tensor, zeros: int = 0) -> None:
        if item.moment is None:
            item.moment = self._new(item)
        try:
            if len(rows):
                item.moment.update(rows, self._draw)
            if zeros:
                item.moment.add_zeros(zeros)
        except StatisticsError as problem:
            raise StatisticsError(f"layer '{item.lead}': {problem}") from problem

    def _real_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        """The rows at real positions, which are looked up once a pass and mask; all, uncopied."""
        key = (id(mask), rows.device)  # the masks live as long as the pass
        if key not in self._real:
            self._real[key] = mask.reshape(-1).nonzero()[:, 0].to(rows.device)
        real = self._real[key]
        return rows if len(real) == len(rows) else rows.index_select(0, real)

    def _new(self, item: _Input) -> Moment:
        if self.granularity == "task_mean":
            return MeanMoment(item.width)
        return self._representation.new(self._kinds[item.lead], item.width)

    def result(self) -> tuple[dict[str, Moment], dict[str, str]]:
        """The moments by lead layer, and every layer's lead.

        Raises:
            StatisticsError: nothing was discovered.
        """
        if not self._inputs:
            raise StatisticsError("no sample was seen: the data is empty.")
        moments = {
            i.lead: i.moment if i.moment is not None else self._new(i)
            for i in self._inputs.values()
        }
        return moments, {layer: item.lead for layer, item in self._inputs.items()}


def _fits(features: Tensor, mask: torch.Size) -> bool:
    """Whether features lie on the positions of a mask, in its shape or flattened to rows."""
    flat = features.ndim == 2 and features.shape[0] == mask.numel() != mask[0]
    return features.shape[:-1] == mask or flat

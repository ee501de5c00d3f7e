"""Diagonal Fisher information of adapted layers, from a model's own labels on a task's rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.models.modules import evaluating, inputs_on, is_transposed, layer_of

_AT_ONCE = 2**24
"""Numbers in the per-sample gradients that are held at once: 64 MiB in float32."""

_Calls = dict[str, list[tuple[Tensor, Tensor]]]


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    regression: bool = False,
    outputs: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of the layers' weights, `[d_out, d_in]` a layer.

    `F = E_x E_{y ~ p(y|x)} [(∂ log p(y|x) / ∂W)²]`: the mean over the samples, the expectation
    over labels exact, one backward pass a label. A regression's output is the mean of a Gaussian
    of variance 1, which gives `E_x [(∂f/∂W)²]`. The gradient of a sample is the sum over its
    positions of `g hᵀ`, with `h` the layer's input there and `g` the gradient at its output; a
    layer that runs several times (shared weights) sums over its calls before squaring. It is never
    negative. Units: squared nats per squared unit of weight.

    Cost: a forward pass and C backward passes a batch, and O(C · positions · d_out · d_in) a layer;
    memory one float64 number a weight, and the gradients of a few samples.

    Args:
        model: the fine-tuned model: base, adapter and the task's head. It runs in eval mode and is
            left as it was; a PEFT model runs with its adapters, `W` being the effective weight.
        batches: model inputs; a `labels` entry is ignored, since the model's own labels count.
        layers: names of `nn.Linear` or `Conv1D` layers in the model.
        regression: the model has one output, a value.
        outputs: the logits `[samples, classes]` of a batch; by default the model's own. A batch may
            then be anything, and a sample may run as several rows of the model's input, as many a
            sample, one sample's after another's.
        progress: called with the number of samples after each batch.

    Raises:
        AdapterError: a layer that the model does not have, or that does not run.
        StatisticsError: no samples; information that is not finite; a layer that does not see its
            input a sample at a time.

    Source: Matena and Raffel 2022, arXiv 2111.09832, eq. 3.
    """
    modules = {name: _linear(model, name) for name in layers}
    parameter = next(model.parameters())
    sums: dict[str, Tensor] = {}
    samples = 0
    with evaluating(model), _watching(modules) as calls:
        for batch in batches:
            with torch.enable_grad():
                logits = (outputs or _logits)(model, batch)
            _add(sums, calls, logits, regression=regression, several=outputs is not None)
            calls.clear()
            samples += len(logits)
            if progress is not None:
                progress(len(logits))
    if not samples:
        raise StatisticsError("no samples to take Fisher information of: give at least one row.")
    for name in layers:
        if name not in sums:
            raise AdapterError(f"layer '{name}' has no part in the model's output: leave it out.")
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    found = {name: (sums[name] / samples).to(dtype) for name in layers}
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise StatisticsError(
                f"the Fisher information of layer '{name}' is not finite: check the adapter, or "
                "collect it in float32."
            )
    return found


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What a classifier says to a batch of model inputs."""
    device = next(model.parameters()).device
    return model(**inputs_on(device, batch)).logits


def _linear(model: nn.Module, name: str) -> nn.Module:
    inner = getattr(model, "get_base_model", lambda: model)()
    module = layer_of(inner, name)
    base = getattr(module, "base_layer", module)
    if not isinstance(base, nn.Linear) and not is_transposed(base):
        raise AdapterError(
            f"layer '{name}' is of type {type(base).__name__}: Fisher information is taken of "
            "linear layers only."
        )
    return module


@contextmanager
def _watching(modules: Mapping[str, nn.Module]) -> Generator[_Calls, None, None]:
    """What goes into each layer and what comes out, by call; gradients can be taken at the outs."""
    calls: _Calls = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            # In a frozen model nothing before the first layer carries gradients: begin here.
            probe = output if output.requires_grad else output.detach().requires_grad_()
            calls.setdefault(name, []).append((inputs[0].detach(), probe))
            return probe.clone()  # what changes the output in place must not change the probe

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _add(
    sums: dict[str, Tensor], calls: _Calls, logits: Tensor, *, regression: bool, several: bool
) -> None:
    """Add a batch: for every label, its probability times the squared gradients of its log."""
    names = list(calls)
    if not names or not logits.requires_grad:
        return  # none of the layers has a part in the output
    probes = [probe for name in names for _, probe in calls[name]]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if regression:
        heights, shares = logits[:, :1], torch.ones_like(logits[:, :1])
    else:
        heights = logits.log_softmax(dim=-1)
        shares = heights.detach().exp()
    count, count_of = heights.shape[1], len(heights)
    for label in range(count):
        # Samples do not meet in the model, so the gradient of the sum holds each one's own.
        found = torch.autograd.grad(
            heights[:, label].sum(), probes, retain_graph=label + 1 < count, allow_unused=True
        )
        gradients = iter(cast(Sequence[Tensor | None], found))  # None for what was not used
        for name in names:
            pairs = [(h, g) for h, _ in calls[name] if (g := next(gradients)) is not None]
            if several:
                pairs = [(_by_sample(h, count_of), _by_sample(g, count_of)) for h, g in pairs]
            _add_squares(sums, name, pairs, shares[:, label])


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """Rows of one sample as one row with all their positions, where the numbers allow it."""
    if len(rows) == samples or len(rows) % samples:
        return rows
    return rows.reshape(samples, -1, rows.shape[-1])


def _add_squares(
    sums: dict[str, Tensor], name: str, pairs: Sequence[tuple[Tensor, Tensor]], shares: Tensor
) -> None:
    """Add `Σ_b share_b (Σ_calls Σ_positions g hᵀ)²`, a few samples at a time."""
    if not pairs:
        return
    size = len(shares)
    if any(len(h) != size for h, _ in pairs):
        raise StatisticsError(
            f"layer '{name}' does not see its input a sample at a time: its Fisher information "
            "cannot be taken."
        )
    d_in, d_out = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    if name not in sums:
        wide = torch.float32 if shares.device.type == "mps" else torch.float64
        sums[name] = torch.zeros(d_out, d_in, dtype=wide, device=shares.device)
    step = max(1, _AT_ONCE // (d_in * d_out))
    for start in range(0, size, step):
        chunk = slice(start, start + step)
        gradient = sum(
            torch.einsum(
                "bto,bti->boi",
                g[chunk].reshape(len(g[chunk]), -1, d_out).to(shares.dtype),
                h[chunk].reshape(len(h[chunk]), -1, d_in).to(shares.dtype),
            )
            for h, g in pairs
        )
        assert isinstance(gradient, Tensor)
        sums[name] += torch.einsum("b,boi->oi", shares[chunk], gradient.square())

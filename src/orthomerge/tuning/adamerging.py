"""AdaMerging: coefficients of an exact sum that make its answers on unlabelled rows sure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from orthomerge.errors import MergeError
from orthomerge.evaluation.classification import load_head
from orthomerge.factors import LoraFactors
from orthomerge.io.files import derive_seed
from orthomerge.merging import plan_merge
from orthomerge.models.loading import preferred_device
from orthomerge.statistics import batches
from orthomerge.tasks import Row
from orthomerge.training.distillation.batches import Draws
from orthomerge.training.distillation.updates import Added, Adder, layers_of
from orthomerge.tuning.inputs import Inputs, load_with_head, tokenizer_of
from orthomerge.tuning.result import Method, Trial, Tuned

_KEPT = 200
"""Steps that are kept in the record, besides the last."""


@dataclass(frozen=True)
class EntropySettings:
    """The paper's settings: Adam at 1e-3 from 0.3, 500 steps of 16 rows per task.

    `layerwise` gives every layer coefficients of its own. As in the authors' code, coefficients
    stay in [0, 1].
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    init: float = 0.3
    layerwise: bool = False
    seed: int = 0
    max_length: int = 48

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MergeError(f"{name} {getattr(self, name)}: it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise MergeError(f"learning rate {self.learning_rate:g}: it must be above 0.")
        if not 0 <= self.init <= 1:
            raise MergeError(f"initial coefficient {self.init:g}: it must be from 0 to 1.")


def minimise_entropy(
    inputs: Inputs,
    *,
    settings: EntropySettings | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Tuned:
    """The coefficients λ of `Σ_t λ_t ΔW_t` that minimise the entropy of the predictions.

    `min_λ Σ_t E_{x in task t} H(p(· | x; W + Σ_u λ_u ΔW_u, head t))`, H in nats, by Adam on seeded
    batches of every task; λ one per task, or one per task and layer. Labels are not read. The sum
    is applied in factors, `W x + Σ_t λ_t s_t B_t (A_t x)`, so that nothing dense is formed. Cost:
    T forward and backward passes per step, and one pass over all rows at the end.

    Args:
        inputs: adapters, tasks and rows, from `read_inputs`.
        settings: of the descent.
        progress: called with the steps done, their total and the mean entropy of the step, in nats.

    Returns:
        the last coefficients with every task's entropy over all its rows, and the descent as
        trials: every few steps the coefficients (layerwise: their means over the layers) and the
        entropies of that step's batches; the last one over all rows.

    Raises:
        MergeError: a task that is a regression, which has no entropy.
        AdapterError: an adapter or a head that does not fit the base.

    Source: Yang et al. 2024, arXiv 2310.02575, eq. 4 and section 3.2.2.
    """
    settings = settings or EntropySettings()
    for task in inputs.tasks:
        if task.regression:
            raise MergeError(
                f"task '{task.task.name}' is a regression, whose predictions have no entropy: "
                "leave it out, or tune on validation rows."
            )
    plan_merge([a.layers for a in inputs.adapters])
    entropies = Entropies(inputs, settings.max_length, settings.batch_size)
    rows = len(inputs.layers) if settings.layerwise else 1
    coefficients = torch.full((rows, len(inputs.adapters)), settings.init, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=settings.learning_rate)
    draws = [
        Draws(
            range(len(t.rows)), settings.batch_size, derive_seed(settings.seed, "entropy", str(i))
        )
        for i, t in enumerate(inputs.tasks)
    ]
    trials: list[Trial] = []
    every = max(1, settings.steps // _KEPT)
    for step in range(settings.steps):
        chosen = [draw.next() for draw in draws]
        before = coefficients.detach().clone()
        optimizer.zero_grad()
        values = entropies.descend(coefficients, chosen)
        optimizer.step()
        with torch.no_grad():
            coefficients.clamp_(0, 1)
        if step % every == 0:
            trials.append(_trial(step, before, values))
        if progress is not None:
            progress(step + 1, settings.steps, sum(values) / len(values))
    final = coefficients.detach()
    values = entropies.over_all(final)
    trials.append(_trial(settings.steps, final, values))
    return _tuned(inputs, settings, final, trials)


def _trial(step: int, coefficients: Tensor, values: list[float]) -> Trial:
    means = [float(value) for value in coefficients.mean(dim=0)]
    return Trial(step, means, sum(values) / len(values), values)


def _tuned(
    inputs: Inputs, settings: EntropySettings, coefficients: Tensor, trials: list[Trial]
) -> Tuned:
    last = trials[-1]
    by_layer: dict[str, list[float]] = {}
    if settings.layerwise:
        for layer, row in zip(inputs.layers, coefficients, strict=True):
            by_layer[f"^{re.escape(layer)}$"] = [float(value) for value in row]
    return Tuned(
        objective="entropy",
        weights=last.weights,
        layer_weights=by_layer,
        value=last.value,
        tasks=last.tasks,
        best=last.number,
        trials=trials,
        labels=inputs.names,
        method=Method(),
        settings=asdict(settings),
    )


class Entropies:
    """The mean entropy of every task's predictions, as a function of the coefficients.

    Coefficients are `[1, adapters]`, or `[layers, adapters]` in the order of `inputs.layers`.
    """

    def __init__(self, inputs: Inputs, max_length: int, batch_size: int) -> None:
        self._inputs, self._max_length, self._batch_size = inputs, max_length, batch_size
        self._tokenizer, self._device = tokenizer_of(inputs.base), preferred_device()
        self._models: dict[int, Any] = {}
        for adapter, task in zip(inputs.adapters, inputs.tasks, strict=True):
            if task.outputs in self._models:
                load_head(self._models[task.outputs], adapter.modules)
            else:
                self._models[task.outputs] = load_with_head(
                    inputs.base, self._tokenizer, adapter.modules, task.outputs, regression=False
                ).to(self._device)
        self._sums = {
            layer: _Sum.of([a.layers.get(layer) for a in inputs.adapters], self._device)
            for layer in inputs.layers
        }
        shapes = {name: (len(s.B), s.A.shape[1]) for name, s in self._sums.items()}
        self._adders = {
            outputs: Adder(layers_of(model, shapes)) for outputs, model in self._models.items()
        }

    def of(self, index: int, coefficients: Tensor, rows: Sequence[Row]) -> Tensor:
        """The mean entropy, in nats, of one task's predictions on rows; differentiable."""
        texts = [(row.text, row.pair) for row in rows]
        (batch,) = batches(
            texts, self._tokenizer, batch_size=len(texts), max_length=self._max_length
        )
        outputs = self._inputs.tasks[index].outputs
        model = self._models[outputs]
        by_layer = coefficients.to(self._device).expand(len(self._sums), -1)
        placed = {name: tensor.to(self._device) for name, tensor in batch.items()}
        modules = self._inputs.adapters[index].modules
        sums = zip(self._sums.items(), by_layer, strict=True)
        with self._adders[outputs].using({name: s.at(own) for (name, s), own in sums}):
            head = {k: v.to(self._device, model.dtype) for k, v in modules.items()}
            logs = functional_call(model, head, (), placed).logits.log_softmax(dim=-1)
        return -(logs.exp() * logs).sum(dim=-1).mean()

    def descend(self, coefficients: Tensor, chosen: Sequence[Sequence[int]]) -> list[float]:
        """Add the gradient of the sum over tasks, a task at a time; each one's entropy."""
        values: list[float] = []
        for index, places in enumerate(chosen):
            rows = self._inputs.tasks[index].rows
            loss = self.of(index, coefficients, [rows[i] for i in places])
            loss.backward()
            values.append(float(loss.detach()))
        return values

    def over_all(self, coefficients: Tensor) -> list[float]:
        """Each task's entropy over all its rows."""
        values: list[float] = []
        for index, task in enumerate(self._inputs.tasks):
            total = 0.0
            for start in range(0, len(task.rows), self._batch_size):
                chunk = task.rows[start : start + self._batch_size]
                with torch.no_grad():
                    total += len(chunk) * float(self.of(index, coefficients, chunk))
            values.append(total / len(task.rows))
        return values


class _Sum(NamedTuple):
    """A layer's updates of all adapters next to each other: `A [R, d_in]`, `B [d_out, R]`, scaled.

    `owner [R]` is the number of the adapter that each rank is of.
    """

    A: Tensor
    B: Tensor
    owner: Tensor

    @classmethod
    def of(cls, factors: Sequence[LoraFactors | None], device: torch.device) -> _Sum:
        held = [(i, f.to(device, torch.float32)) for i, f in enumerate(factors) if f is not None]
        return cls(
            torch.cat([f.A for _, f in held]),
            torch.cat([f.scaling * f.B for _, f in held], dim=1),
            torch.cat([torch.full((f.rank,), i, device=device) for i, f in held]),
        )

    def at(self, coefficients: Tensor) -> Added:
        """`Σ_t λ_t s_t B_t A_t`, in factors."""
        return Added(self.A, self.B * coefficients[self.owner])

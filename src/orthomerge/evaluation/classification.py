"""Scores: a base model, an update and a head in; predictions and metrics out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr  # pyright: ignore[reportUnknownVariableType]
from sklearn.metrics import (
    accuracy_score,  # pyright: ignore[reportUnknownVariableType]
    f1_score,  # pyright: ignore[reportUnknownVariableType]
    matthews_corrcoef,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor, nn
from torch.nn import functional as F

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.models.loading import (
    agree_on_padding,
    another_head,
    encode,
    in_precision,
    load_classifier,
    preferred_device,
)
from orthomerge.models.modules import is_transposed, layer_of
from orthomerge.tasks import Row, Task

Update = Mapping[str, LoraFactors | Tensor]


@contextmanager
def applied(model: nn.Module, update: Update) -> Generator[None, None, None]:
    """The model with `W + ΔW` in its layers for the length of a block, then exactly as before.

    To a layer in 16 bits, which would round small updates away, the update's product is added.

    Raises:
        AdapterError: a layer the model does not have, or a shape that does not fit it.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    hooks: list[Any] = []
    try:
        for name, item in update.items():
            layer = layer_of(model, name)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            delta = item.delta() if isinstance(item, LoraFactors) else item
            delta = delta.T if is_transposed(layer) else delta
            if weight.shape != delta.shape:
                raise AdapterError(
                    f"layer '{name}' is {list(weight.shape)}, the update {list(delta.shape)}: "
                    "the adapter was made for another model."
                )
            if weight.dtype.itemsize < 4 and not isinstance(layer, nn.Embedding):
                hooks.append(layer.register_forward_hook(_beside(item, weight)))
                continue
            saved.append((weight, weight.detach().clone()))
            with torch.no_grad():
                weight += delta.to(weight)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for weight, original in saved:
                weight.copy_(original)


def _beside(item: LoraFactors | Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """A hook that adds an update's product to a layer's, so that 16 bits do not round it away."""
    if isinstance(item, LoraFactors):
        factors = [item.A.to(weight), (item.B * item.scaling).to(weight)]
    else:
        factors = [item.to(weight)]

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        more = inputs[0]
        for factor in factors:
            more = F.linear(more, factor)
        return output + more

    return hook


def score(
    kind: str, predictions: np.ndarray, labels: Sequence[int | float], num_labels: int
) -> dict[str, float]:
    """All metrics of a task's kind by name.

    Classification: `accuracy`, `matthews`, `f1` (of class 1 for two classes, macro for more); the
    prediction -1 is an answer that is no class, and wrong.
    Regression: `pearson`, `spearman` and their mean `pearson_spearman`; a constant prediction
    orders nothing and scores 0.
    """
    truth = np.asarray(labels)
    if kind == "regression":
        if np.ptp(predictions) == 0 or np.ptp(truth) == 0:
            return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
        # SciPy's result types are not visible to the type checker.
        correlations: list[Any] = [pearsonr(predictions, truth), spearmanr(predictions, truth)]
        pearson, spearman = (float(c.statistic) for c in correlations)
        return {
            "pearson": pearson,
            "spearman": spearman,
            "pearson_spearman": (pearson + spearman) / 2,
        }
    classes = [1] if num_labels == 2 else sorted({*truth.tolist(), *predictions.tolist()} - {-1})
    zero: Any = 0.0  # a class never predicted scores 0
    return {
        "accuracy": float(accuracy_score(truth, predictions)),
        "matthews": float(matthews_corrcoef(truth, predictions)),
        "f1": float(
            f1_score(truth, predictions, labels=classes, average="macro", zero_division=zero)
        ),
    }


class Evaluator:
    """Scores any update with any head on one base model, which is loaded once for all of them.

    It runs on `device`, by default on the accelerator that PyTorch sees. With `precision` "bf16"
    the base is held in bfloat16 (`in_precision`).
    """

    def __init__(
        self,
        base: str,
        tokenizer: Any,
        *,
        max_length: int = 48,
        batch_size: int = 64,
        device: torch.device | None = None,
        precision: str = "float32",
    ) -> None:
        self._base, self._precision = base, precision
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._batch_size = batch_size
        self._device = device or preferred_device()
        self._models: dict[tuple[int, bool], Any] = {}
        self._batches: dict[tuple[int, int], list[tuple[list[int], dict[str, Tensor]]]] = {}
        self._held: list[Sequence[Row]] = []

    def _model(self, num_labels: int, regression: bool) -> Any:
        key = (num_labels, regression)
        if not self._models:
            model = load_classifier(self._base, num_labels=num_labels, regression=regression)
            model = agree_on_padding(model, self._tokenizer)
            self._models[key] = in_precision(model.eval().to(self._device), self._precision)
        if key not in self._models:
            first = next(iter(self._models.values()))
            other = another_head(first, num_labels=num_labels, regression=regression)
            self._models[key] = in_precision(other, self._precision)
        return self._models[key]

    def _batched(self, rows: Sequence[Row]) -> list[tuple[list[int], dict[str, Tensor]]]:
        key = (id(rows), len(rows))
        if key not in self._batches:
            self._held.append(rows)  # an id is only a name while its object lives
            encoded = encode(self._tokenizer, [(r.text, r.pair) for r in rows], self._max_length)
            order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["input_ids"]))
            chunks = [
                order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)
            ]
            self._batches[key] = [
                (
                    chunk,
                    dict(self._tokenizer.pad([encoded[i] for i in chunk], return_tensors="pt")),
                )
                for chunk in chunks
            ]
        return self._batches[key]

    def predict(
        self,
        rows: Sequence[Row],
        update: Update,
        head: Mapping[str, Tensor] | None,
        *,
        num_labels: int,
        regression: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Predicted class indices, or values for a regression, in the order of `rows`.

        `head` may be None where the base is a classifier that brings its own.
        `progress` is given the rows done, and of how many.

        Raises:
            AdapterError: the update or the head does not fit the model.
        """
        model = self._model(num_labels, regression)
        if head is not None:
            load_head(model, head)
        predictions = np.zeros(len(rows), dtype=float if regression else int)
        done = 0
        with applied(model, update), torch.inference_mode():
            for indices, batch in self._batched(rows):
                placed = {name: tensor.to(self._device) for name, tensor in batch.items()}
                logits = model(**placed).logits.cpu()
                values = logits[:, 0] if regression else logits.argmax(dim=-1)
                predictions[indices] = values.float().numpy() if regression else values.numpy()
                done += len(indices)
                if progress is not None:
                    progress(done, len(rows))
        return predictions

    def score(
        self,
        task: Task,
        rows: Sequence[Row],
        update: Update,
        head: Mapping[str, Tensor],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """All metrics of a task on `rows`, under an update and with the task's head.

        Raises:
            AdapterError: as `predict`.
        """
        predictions = self.predict(
            rows, update, head, num_labels=task.outputs, regression=task.regression,
            progress=progress,
        )  # fmt: skip
        return score(task.kind, predictions, [row.label for row in rows], task.outputs)


def load_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Put a task's head into a classifier.

    Raises:
        AdapterError: no head, or one that does not fit the model.
    """
    if not head:
        raise AdapterError(
            "the adapter carries no head, so the task cannot be scored: train it with "
            "modules_to_save naming the model's classification head."
        )
    own = model.state_dict()
    for name, tensor in head.items():
        if name not in own or own[name].shape != tensor.shape:
            there = list(own[name].shape) if name in own else "missing"
            raise AdapterError(
                f"head '{name}' {list(tensor.shape)} does not fit the model ({there}): it belongs "
                "to a task with other labels or to another model."
            )
    model.load_state_dict(dict(head), strict=False)

"""A model cut at its backbone: hidden states from one pass, and heads read from them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from orthomerge.errors import AdapterError


class _Reached(Exception):
    """Raised when the backbone has its output, so that no head runs behind it."""


class Backbone:
    """The part of a model before its head, and heads of several tasks on top of it.

    Hidden states are taken where the model's own forward pass takes them, and a head is the model's
    own forward pass with the backbone's output put in. So pooling, scaling and soft caps of logits
    are the model's own, and nothing of them is written here. An encoder-decoder that writes text is
    cut behind its decoder.

    Raises:
        AdapterError: a model without a backbone of its own.
    """

    def __init__(self, model: Any, *, language: bool = False) -> None:
        self._model = model
        self.encodes_first = language and bool(getattr(model.config, "is_encoder_decoder", False))
        if self.encodes_first:
            self._below: nn.Module = model.get_decoder()
        else:
            below = getattr(model, model.base_model_prefix, None)
            if not isinstance(below, nn.Module):
                raise AdapterError(
                    f"{type(model).__name__} has no backbone apart from its head: it cannot be "
                    "distilled."
                )
            self._below = below

    def states(self, inputs: Mapping[str, Tensor]) -> Any:
        """The backbone's output, its last hidden state among it; no head runs."""
        found: list[Any] = []

        def reached(module: nn.Module, given: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = self._below.register_forward_hook(reached)
        try:
            self._model(**inputs, use_cache=False) if self._caches else self._model(**inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    @property
    def _caches(self) -> bool:
        return bool(getattr(self._model.config, "use_cache", False))

    def read(self, head: Any, states: Any, inputs: Mapping[str, Tensor]) -> Any:
        """What a model with this backbone makes of the backbone's output."""
        with self._answering(states):
            return head(**inputs)

    @contextmanager
    def _answering(self, output: Any) -> Generator[None, None, None]:
        kept = self._below.__dict__.get("forward")
        self._below.forward = lambda *args, **kwargs: output  # pyright: ignore[reportUnknownLambdaType]
        try:
            yield
        finally:
            del self._below.forward
            if kept is not None:  # a hook of Accelerate's
                self._below.forward = kept


def rows_of(states: Any, rows: Tensor) -> Any:
    """Some rows of a backbone's output."""
    kept = {
        key: value.index_select(0, rows.to(value.device))
        for key, value in states.items()
        if isinstance(value, Tensor)
    }
    return type(states)(**kept)


def only_hidden(states: Any, hidden: Tensor) -> Any:
    """A backbone's output of other hidden states, and nothing else."""
    return type(states)(last_hidden_state=hidden)

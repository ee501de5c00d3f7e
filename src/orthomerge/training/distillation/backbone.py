"""A model cut at its backbone: hidden states from one pass, and heads read from them."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from orthomerge.errors import AdapterError


class _Reached(Exception):
    """Raised when the backbone has its output, so that no head runs behind it."""


class Backbone:
    """The part of a model before its head, and heads of several tasks on top of it.

    Hidden states are taken where the model's own forward pass takes them, and a head is the model's
    own forward pass with the backbone's output put in. So pooling, scaling and soft caps of logits
    are the model's own, and nothing of them is written here. An encoder-decoder that writes text is
    cut behind its decoder; a model without a head is all backbone.
    """

    def __init__(self, model: Any, *, language: bool = False) -> None:
        self._model = model
        self.encodes_first = language and bool(getattr(model.config, "is_encoder_decoder", False))
        below = getattr(model, model.base_model_prefix, None)
        self._below: nn.Module = below if isinstance(below, nn.Module) else model
        if self.encodes_first:
            self._below = model.get_decoder()
        self._how: dict[str, Any] = {"use_cache": False} if _caches(model) else {}

    def require_inside(self, layers: Mapping[str, nn.Module]) -> None:
        """Refuse updates of a head's own layers, which the tasks do not share.

        Raises:
            AdapterError: one of these layers is behind the backbone.
        """
        output = self._model.get_output_embeddings() if self.encodes_first else None
        inside = {id(m) for m in (self._model if self.encodes_first else self._below).modules()}
        for name, layer in layers.items():
            if id(layer) not in inside or layer is output:
                raise AdapterError(
                    f"the adapters change '{name}', which is behind the backbone: only adapters of "
                    "layers that all tasks share can be distilled."
                )

    def states(self, inputs: Mapping[str, Tensor]) -> Any:
        """The backbone's output, its last hidden state among it; no head runs."""
        if self._below is self._model:
            return self._model(**inputs, **self._how)
        found: list[Any] = []

        def reached(module: nn.Module, given: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = self._below.register_forward_hook(reached)
        try:
            self._model(**inputs, **self._how)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def read(self, head: Any, states: Any, inputs: Mapping[str, Tensor]) -> Any:
        """What a model with this backbone makes of the backbone's output."""
        with self._answering(states):
            return head(**inputs)

    def logits(self, hidden: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens vocabulary"]:
        """What a language model makes of hidden states, whatever text they are of."""
        whole = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])  # pyright: ignore[reportArgumentType]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        if not self.encodes_first:
            return self.read(self._model, whole, {"input_ids": ids}).logits[0]
        given: dict[str, Any] = {"encoder_outputs": (hidden[None, :1],), "decoder_input_ids": ids}
        return self.read(self._model, whole, given).logits[0]

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


def _caches(model: Any) -> bool:
    """Whether a model would keep keys and values for tokens to come."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "use_cache" in parameters or (anything and bool(getattr(model.config, "use_cache", 0)))


def rows_of(states: Any, rows: Tensor) -> Any:
    """Some rows of a backbone's output."""
    kept = {
        key: value.index_select(0, rows.to(value.device))
        for key, value in states.items()
        if isinstance(value, Tensor)
    }
    return type(states)(**kept)

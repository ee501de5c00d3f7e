"""The shapes of a base model without its weights: from its config, or as published."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel

from orthomerge.errors import AssetError, RecipeError
from orthomerge.models.assets import is_local, resolve_model
from orthomerge.models.loading import load_skeleton, quiet
from orthomerge.models.packaged import carrying

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32,
          "num_key_value_heads": 8, "dtype": "bfloat16"}  # fmt: skip

# The published dimensions of models that plans are often made for, by the end of their id.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {**_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16,
                     "intermediate_size": 8192, "tie_word_embeddings": True},
    "llama-3.2-3b": {**_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28,
                     "intermediate_size": 8192, "num_attention_heads": 24,
                     "tie_word_embeddings": True},
    "llama-3.1-8b": {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32,
                     "intermediate_size": 14336},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024,
                      "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096, "max_position_embeddings": 514,
                      "type_vocab_size": 1},
    "t5-large": {"model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 64,
                 "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}  # fmt: skip
KNOWN["llama-3-8b"] = KNOWN["meta-llama-3-8b"] = KNOWN["llama-3.1-8b"]


def find_skeleton(base: str) -> tuple[Any, str]:
    """The model called `base` on the meta device, and where its shapes are from.

    A folder or a packaged model gives its config, then dimensions known here, then the hub's
    config; no weights are fetched.

    Raises:
        AssetError: a folder that is no model.
        RecipeError: no place knows the model.
    """
    if is_local(base) or carrying(base):
        return load_skeleton(resolve_model(base).path_or_id), "its config"
    known = KNOWN.get(base.rsplit("/", 1)[-1].lower())
    if known is not None:
        config = AutoConfig.for_model(**known)
        with quiet(), torch.device("meta"):
            return cast(Any, AutoModel).from_config(config), "published dimensions"
    try:
        return load_skeleton(base), "the hub's config"
    except AssetError as problem:
        raise RecipeError(
            f"the shapes of '{base}' are not known here and the hub gave none: name a folder with "
            f"its config.json as 'base', or one of {', '.join(KNOWN)}."
        ) from problem

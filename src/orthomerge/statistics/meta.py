"""What statistics say about themselves: the model, its layers, and how the texts were read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from orthomerge.io.files import fingerprint

FORMAT, OLDER = 3, (2,)
"""The format that is written, and those that are read besides."""
# What a config says about how it was loaded or labelled, not about what the model computes.
_NOT_ARCHITECTURE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id",
    "num_labels", "problem_type", "transformers_version", "finetuning_task", "use_cache",
    "classifier_dropout", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip

# What must be the same for two statistics to be used together, and what it is called.
_COMPARED = {
    "config_hash": "model configuration", "model_sha256": "model weights",
    "model_revision": "model revision", "tokenizer_hash": "tokenizer",
    "target_modules": "target modules", "granularity": "granularity", "form": "form",
}  # fmt: skip


def describe_model(model: nn.Module, model_id: str | None = None) -> dict[str, Any]:
    """Id, revision, hash of the architecture's config and dtype of a loaded model."""
    config = getattr(model, "config", None)
    values: Mapping[str, Any] = config.to_dict() if config is not None else {}
    kept = {k: v for k, v in values.items() if k not in _NOT_ARCHITECTURE}
    ends = values.get("eos_token_id")
    if kept.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        # Decoders without a padding token are given their end token to be classifiers.
        kept["pad_token_id"] = None
    return {
        "model_id": model_id or str(values.get("_name_or_path") or type(model).__name__),
        "model_revision": getattr(config, "_commit_hash", None),
        "config_hash": fingerprint(json.loads(json.dumps(kept, default=str))),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class StatisticsMeta:
    """What the statistics belong to; enough to refuse a mismatch.

    `form` is how the texts were read: "classifier" as they are, "text" in a prompt and with an
    answer, `prompt` being the hash of that prompt; `max_length` is the most tokens of a text.
    `directions` and `noise` are set where only part was published (`Statistics.published`).
    """

    model_id: str
    config_hash: str
    target_modules: list[str]
    granularity: str
    samples: int
    dtype: str = "float32"
    model_revision: str | None = None
    model_sha256: str | None = None
    tokenizer_hash: str | None = None
    form: str = "classifier"
    prompt: str | None = None
    max_length: int | None = None
    directions: int | None = None
    noise: float | None = None
    format: int = FORMAT
    tool: str = field(default_factory=lambda: f"orthomerge {_version()}")

    def difference(self, other: StatisticsMeta) -> tuple[str, str, str] | None:
        """What keeps the two from being used together: its name, here and there; None for nothing.

        What one of them does not say is no difference.
        """
        for attribute, word in _COMPARED.items():
            here, there = getattr(self, attribute), getattr(other, attribute)
            if here == there or None in (here, there):
                continue
            if attribute in ("config_hash", "model_sha256"):
                here, there = f"'{self.model_id}' {here[:12]}", f"'{other.model_id}' {there[:12]}"
            elif attribute == "tokenizer_hash":
                here, there = here[:12], there[:12]
            elif attribute == "target_modules":
                here, there = ",".join(here), ",".join(there)
            return word, here, there
        return None


def _version() -> str:
    from importlib.metadata import version

    return version("orthomerge")

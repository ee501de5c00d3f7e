"""The statistics of one task on one base model, and the file that carries them between teams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from orthomerge.errors import StatisticsError
from orthomerge.features.second_moment import SecondMoment
from orthomerge.files import atomic_path, fingerprint

FORMAT = 1
SUFFIX = ".stats.safetensors"
# What a config says about how it was loaded or labelled, not about what the model computes.
_NOT_ARCHITECTURE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id",
    "num_labels", "problem_type", "transformers_version", "finetuning_task", "use_cache",
    "classifier_dropout", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip


def describe_model(model: nn.Module, model_id: str | None = None) -> dict[str, Any]:
    """Id, revision, hash of the architecture's config and dtype of a loaded model."""
    config = getattr(model, "config", None)
    values: Mapping[str, Any] = config.to_dict() if config is not None else {}
    kept = {k: v for k, v in values.items() if k not in _NOT_ARCHITECTURE}
    return {
        "model_id": model_id or str(values.get("_name_or_path") or type(model).__name__),
        "model_revision": getattr(config, "_commit_hash", None),
        "config_hash": fingerprint(json.loads(json.dumps(kept, default=str))),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class StatisticsMeta:
    """What the statistics belong to; enough to refuse a mismatch."""

    model_id: str
    config_hash: str
    target_modules: list[str]
    granularity: str
    samples: int
    dtype: str = "float32"
    model_revision: str | None = None
    model_sha256: str | None = None
    tokenizer_hash: str | None = None
    format: int = FORMAT
    tool: str = field(default_factory=lambda: f"orthomerge {_version()}")


def _version() -> str:
    from importlib.metadata import version

    return version("orthomerge")


@dataclass(frozen=True)
class Statistics:
    """Second moments by distinct layer input, and which layer reads which.

    `moments` is keyed by the first layer that reads an input; `layers` maps every target layer to
    that key.
    """

    moments: dict[str, SecondMoment]
    layers: dict[str, str]
    meta: StatisticsMeta

    def second_moment(self, layer: str) -> Float[Tensor, "d_in d_in"]:
        """`S` at a layer's input, float64.

        Raises:
            StatisticsError: no statistics for that layer.
        """
        if layer not in self.layers:
            raise StatisticsError(
                f"no statistics for layer '{layer}': these cover "
                f"{', '.join(self.meta.target_modules)} of '{self.meta.model_id}'."
            )
        return self.moments[self.layers[layer]].matrix

    def save(self, path: str | Path) -> Path:
        """Write one `.safetensors` file: no text, no rows, only moments, counts and metadata."""
        path = Path(path)
        tensors = {f"second_moment.{k}": m.matrix.contiguous() for k, m in self.moments.items()}
        meta = {
            "orthomerge": json.dumps(asdict(self.meta)),
            "layers": json.dumps(self.layers),
            "counts": json.dumps({k: m.count for k, m in self.moments.items()}),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=meta)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a statistics file.

        Raises:
            StatisticsError: no such file, not a statistics file, or a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise StatisticsError(f"no statistics file '{path}': make one with 'orthomerge stats'.")
        try:
            with safe_open(path, framework="pt") as stream:
                header = stream.metadata() or {}
                if "orthomerge" not in header:
                    raise StatisticsError(
                        f"'{path}' is not a statistics file: make one with 'orthomerge stats'."
                    )
                values = json.loads(header["orthomerge"])
                if values.get("format", 0) > FORMAT:
                    raise StatisticsError(
                        f"'{path}' has format {values['format']}, this version reads up to "
                        f"{FORMAT}: update orthomerge."
                    )
                meta = StatisticsMeta(**values)
                layers = json.loads(header["layers"])
                counts = json.loads(header["counts"])
                moments = {
                    key: SecondMoment.from_matrix(stream.get_tensor(f"second_moment.{key}"), count)
                    for key, count in counts.items()
                }
        except (SafetensorError, ValueError, TypeError, KeyError) as problem:
            raise StatisticsError(
                f"'{path}' cannot be read as statistics ({problem}): collect it again."
            ) from problem
        return cls(moments=moments, layers=layers, meta=meta)

    def require_model(self, sha256: str, model_id: str, *, name: str) -> None:
        """Refuse statistics of another model's weights.

        Raises:
            StatisticsError: the hash of the weights differs.
        """
        if self.meta.model_sha256 not in (None, sha256):
            raise StatisticsError(
                f"{name} was collected on '{self.meta.model_id}', whose weights are not those of "
                f"'{model_id}': collect it on this model."
            )

    def require_match(self, other: Statistics, *, mine: str, theirs: str) -> None:
        """Refuse to use two statistics together that do not describe the same layers.

        Raises:
            StatisticsError: another model, target set or granularity.
        """
        for attribute, word in (
            ("config_hash", "model"),
            ("model_sha256", "model weights"),
            ("target_modules", "target modules"),
            ("granularity", "granularity"),
        ):
            here, there = getattr(self.meta, attribute), getattr(other.meta, attribute)
            if here != there and None not in (here, there):
                if word.startswith("model"):
                    here, there = self.meta.model_id, other.meta.model_id
                raise StatisticsError(
                    f"{mine} and {theirs} differ in their {word} ({here} and {there}): "
                    "statistics can be combined only on equal terms; collect one of them again."
                )


def combined_moment(
    statistics: Sequence[Statistics], layer: str, weights: Sequence[float] | None = None
) -> Float[Tensor, "d_in d_in"]:
    """`S_other = Σ_u w_u S_u` at a layer, the weights made to sum to one (equal by default)."""
    weights = [1.0] * len(statistics) if weights is None else list(weights)
    total = sum(weights)
    first = statistics[0].second_moment(layer)
    matrix = torch.zeros_like(first)
    for item, weight in zip(statistics, weights, strict=True):
        matrix += (weight / total) * item.second_moment(layer)
    return matrix

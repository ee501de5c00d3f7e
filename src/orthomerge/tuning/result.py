"""What tuning found, and the record of it: all that is needed to merge so again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orthomerge.adapters import Needed, merge_adapters
from orthomerge.io.files import write_json
from orthomerge.merging import MergeConfig, MergedUpdate
from orthomerge.tuning.inputs import Inputs

WEIGHTS, MERGED = "weights.json", "merged"
FORMAT = 1


@dataclass(frozen=True)
class Method:
    """How adapters are merged apart from the weights: what is asked, what the method is given.

    `files` are the SHA-256 of what `needed` was read from.
    """

    config: MergeConfig = field(default_factory=MergeConfig)
    needed: Needed = field(default_factory=Needed)
    files: list[str] = field(default_factory=list[str])

    def arguments(self, **weights: Any) -> dict[str, Any]:
        """As `merge_layers` and `merge_adapters` take it, under these weights.

        A trial merges as the adapter will be that comes of the search.
        """
        return {"config": replace(self.config.for_adapter(), **weights), **self.needed._asdict()}

    def record(self) -> dict[str, Any]:
        """As JSON, what was read from files by its hash."""
        asked = self.config.for_adapter().to_dict()
        return {
            "name": self.config.method,
            **{key: asked[key] for key in ("options", "rank", "seed")},
            **({"energy": self.config.energy} if self.config.energy is not None else {}),
            "files": self.files,
        }


@dataclass(frozen=True)
class Trial:
    """One set of weights and what it came to: the objective's value, and the value of each task.

    `weights` are in the order of `Tuned.labels`.
    """

    number: int
    weights: list[float]
    value: float
    tasks: list[float]


@dataclass(frozen=True)
class Tuned:
    """The best weights found.

    `weights` are one an adapter; with `layer_weights`, the mean over the layers, which decides
    nothing. `value` is the objective's, `tasks` each task's; `trials` all that was tried, whose
    weights are called `labels`. `objective` is "validation" (higher is better) or "entropy" (nats,
    lower is better).
    """

    objective: str
    weights: list[float]
    layer_weights: dict[str, list[float]]
    value: float
    tasks: list[float]
    best: int
    trials: list[Trial]
    labels: list[str]
    method: Method
    settings: dict[str, Any]

    def merge(self, inputs: Inputs, output: str | Path) -> MergedUpdate:
        """Merge with the weights found, into the folder `output`."""
        return merge_adapters(
            inputs.adapters,
            output=output,
            overwrite=True,
            **self.method.arguments(weights=self.weights, layer_weights=self.layer_weights),
        )

    def record(self, inputs: Inputs) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "format": FORMAT,
            "objective": self.objective,
            "score": self.value,
            "weights": self.weights,
            "layer_weights": self.layer_weights,
            "method": self.method.record(),
            "tasks": [
                {
                    "name": t.task.name,
                    "metric": "entropy" if self.objective == "entropy" else t.task.metric,
                    "score": value,
                    "rows": len(t.rows),
                    "rows_sha256": t.fingerprint,
                }
                for t, value in zip(inputs.tasks, self.tasks, strict=True)
            ],
            "adapters": [
                {"name": name, "path": str(a.path or a.name), "sha256": a.sha256}
                for name, a in zip(inputs.names, inputs.adapters, strict=True)
            ],
            "base_model": {"name": inputs.base.name, "sha256": inputs.base.sha256},
            "settings": self.settings,
            "best": self.best,
            "labels": self.labels,
            "trials": [asdict(trial) for trial in self.trials],
            "versions": {p: version(p) for p in ("orthomerge", "torch", "transformers")},
        }

    def save(self, inputs: Inputs, folder: str | Path) -> Path:
        """Write `merged/`, then `weights.json`, each at once or not at all; the path of the last.

        Raises:
            OrthomergeError: the folder cannot be written.
        """
        folder = Path(folder)
        self.merge(inputs, folder / MERGED)
        write_json(folder / WEIGHTS, self.record(inputs))
        return folder / WEIGHTS

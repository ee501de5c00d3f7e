"""What comes out of a merge: one layer, and all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors
from orthomerge.merging.config import MergeConfig
from orthomerge.merging.registry import Update


@dataclass(frozen=True)
class MergedLayer:
    """One layer's result: its shared update, each task's own where the method leaves such.

    `truncation_error` is `‖merged - truncated‖_F / ‖merged‖_F` where a rank was asked for or the
    method itself truncates, None otherwise.
    """

    name: str
    update: Update
    tasks: tuple[Update, ...] = ()
    truncation_error: float | None = None


@dataclass(frozen=True)
class MergedUpdate:
    """The merged update of every layer: factors where the method keeps them, else dense.

    `tasks` holds every task's own layers, in the order of the adapters, where the method leaves
    one update per task; it is empty otherwise. `truncation_error` is by layer, empty where nothing
    was cut. `config` is what was done, with the weight of every adapter, where it came of a merge.
    """

    layers: Mapping[str, Update]
    method: str
    truncation_error: Mapping[str, float] = field(default_factory=dict[str, float])
    tasks: tuple[Mapping[str, Update], ...] = ()
    config: MergeConfig | None = None

    def of(self, task: int) -> Mapping[str, Update]:
        """What the adapter number `task` becomes: its own layers, or those all tasks share."""
        return self.tasks[task] if self.tasks else self.layers

    def dense(self, layer: str) -> Float[Tensor, "d_out d_in"]:
        """The dense update of one layer. O(d_out · rank · d_in) for factors.

        Raises:
            MergeError: no such layer; the message names the nearest.
        """
        if layer not in self.layers:
            raise unknown_name("layer", layer, self.layers, error=MergeError)
        update = self.layers[layer]
        return update.delta() if isinstance(update, LoraFactors) else update

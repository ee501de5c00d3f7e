"""Where a training goes on after it was stopped: the Trainer's checkpoints beside the output."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from orthomerge.errors import TrainingError, TrainingStopped
from orthomerge.io.documents import Unreadable, is_object, read_json
from orthomerge.io.files import atomic_path, write_json

ABOUT, WHOLE = "checkpoints.json", "whole.safetensors"
"""What the checkpoints are of, and the file that is written last into each."""


class Checkpoints(TrainerCallback):
    """Use it to let a Trainer go on where it was stopped.

    A checkpoint is taken after `every` seconds, by several processes after each epoch (their clocks
    differ), and where `stop` says that the training is to end early. One that was cut off while it
    was written is passed by.

    Args:
        folder: where they are kept, until the training is done.
        key: the hash of all that the training depends on.
        stop: asked after each step whether to end here.
        every: seconds between two checkpoints.
        replace: whether checkpoints of another training are removed instead of refused.

    Raises:
        TrainingError: the folder holds checkpoints of another training, or something else.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        stop: Callable[[], bool] | None = None,
        every: float = 60.0,
        replace: bool = False,
    ) -> None:
        self.folder, self._stop, self._every = folder, stop, every
        self._last_save = time.monotonic()
        # The random state from which the epoch's order of rows was drawn; the Trainer keeps the one
        # of the step, from which it would draw another order for the rest of the epoch.
        self._drawn_from: Tensor | None = None
        self._resumed: Path | None = None
        self.stopped = False
        if folder.is_dir() and any(folder.iterdir()):
            self._require(key, replace)
        write_json(folder / ABOUT, {"key": key})

    def _require(self, key: str, replace: bool) -> None:
        try:
            about = read_json(self.folder / ABOUT)
        except (Unreadable, OSError):
            about = None
        if is_object(about) and replace and about.get("key") != key:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not is_object(about) or about.get("key") != key:
            raise TrainingError(
                f"'{self.folder}' holds checkpoints of another training (other rows, settings or "
                "start): call the command that made them to go on, or start anew with --overwrite "
                "(overwrite=True), or choose another output."
            )

    def last(self) -> str | None:
        """The newest checkpoint that is whole, to go on from; None where there is none."""
        found = [p.parent for p in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")]
        numbered = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
        for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path not in found:
                shutil.rmtree(path, ignore_errors=True)  # cut off while it was written
        self._resumed = numbered[-1] if numbered else None
        return str(self._resumed) if self._resumed else None

    def clear(self) -> None:
        """Remove the checkpoints of a training that is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def require_done(self) -> None:
        """Refuse to go on with a training that was stopped.

        Raises:
            TrainingStopped: it was; its checkpoint is there.
        """
        if self.stopped:
            raise TrainingStopped(
                f"the training was stopped; its checkpoint is in '{self.folder}': call the same "
                "command again to go on."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the order of an epoch that was begun before once more."""
        if self._resumed is not None:
            torch.set_rng_state(load_file(self._resumed / WHOLE)["drawn_from"])
            self._resumed = None
        self._drawn_from = torch.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where it is time for one."""
        if state.global_step >= state.max_steps:
            return
        if self._stop is not None and self._stop():
            self.stopped = control.should_save = control.should_training_stop = True
        elif args.world_size == 1 and time.monotonic() - self._last_save >= self._every:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Several processes agree on the end of an epoch without asking each other."""
        if args.world_size > 1 and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as whole."""
        self._last_save = time.monotonic()
        if state.is_world_process_zero and self._drawn_from is not None:
            folder = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with atomic_path(folder / WHOLE) as path:
                save_file({"drawn_from": self._drawn_from}, path)

"""The names of the files that adapters, models and outputs consist of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from orthomerge.errors import StatisticsError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files of an adapter."""
DIFFUSION = "pytorch_lora_weights.safetensors"
"""diffusers' file of an adapter of a diffusion model, which may hold several models' layers."""
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a whole model, in one file or by the list of several."""
HEADS, HEAD = "heads", ".safetensors"
"""The folder of a merge in which each task's head has a file, and how such a file ends."""
TASKS = "tasks"
"""The folder of a merge in which a method that leaves one update per task writes each."""
IN_HEADER = "orthomerge_record"
"""Where the header of a file that is a whole output holds its record."""
CARD = "README.md"
MERGE, CONVERT, START, TRAINING = "merge.json", "convert.json", "start.json", "training.json"
SHARE, EXTRACT = "share.json", "extract.json"
RECORDS = (MERGE, CONVERT, START, TRAINING, SHARE, EXTRACT)
"""The files that say what a folder was made from, with a hash of every file in it."""


class MadeBy(NamedTuple):
    """What a file is called in errors, and the command that makes one."""

    file: str
    command: str

    def require(self, path: Path) -> None:
        """Refuse a path at which there is no file.

        Raises:
            StatisticsError: there is none.
        """
        if not path.is_file():
            raise StatisticsError(f"no {self.file} '{path}': make one with '{self.command}'.")


STATISTICS = MadeBy("statistics file", "orthomerge stats")
FISHER = MadeBy("Fisher file", "orthomerge stats fisher")

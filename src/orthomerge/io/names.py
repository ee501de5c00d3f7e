"""The names of the files that adapters and outputs consist of."""

from __future__ import annotations

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files of an adapter."""
DIFFUSION = "pytorch_lora_weights.safetensors"
"""diffusers' file of an adapter of a diffusion model, which may hold several models' layers."""
HEADS, HEAD = "heads", ".safetensors"
"""The folder of a merge in which each task's head has a file, and how such a file ends."""
TASKS = "tasks"
"""The folder of a merge in which a method that leaves one update per task writes each."""
IN_HEADER = "orthomerge"
"""Where the header of a file that is a whole output holds its record."""
CARD = "README.md"
MERGE, CONVERT, START, TRAINING = "merge.json", "convert.json", "start.json", "training.json"
RECORDS = (MERGE, CONVERT, START, TRAINING)
"""The files that say what a folder was made from, with a hash of every file in it."""

"""What a command takes before its work begins: processor time against an import of torch.

    python -m benchmarks.startup

Every command runs in a process of its own, with one thread, in turns with the import; processor
time (user and system) is what is measured, because a shared machine lengthens the other. Medians of
five.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.timing import save
from orthomerge.adapters.peft_config import config_text
from orthomerge.io.names import CONFIG, WEIGHTS

TORCH = ("-c", "import torch")
ROUNDS = 5
WANTED = {"merge of two tiny adapters": "≤ 1.25×", "list": "≤ 0.25 s", "--help": "≤ 0.25 s"}


def adapter(folder: Path, seed: int) -> str:
    """A tiny adapter of a base that is not on this machine."""
    torch.manual_seed(seed)
    layers = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q", "v")]
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, 16)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(16, 4)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {"r": 4, "target_modules": ["q", "v"], "base_model_name_or_path": "org/base"}
    (folder / CONFIG).write_text(config_text(settings), encoding="utf-8")
    return str(folder)


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Processor time of one call of Python."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (ended.ru_utime - began.ru_utime) + (ended.ru_stime - began.ru_stime)


def main() -> None:
    """Measure and keep."""
    with tempfile.TemporaryDirectory() as scratch:
        two = [adapter(Path(scratch) / name, seed) for seed, name in enumerate("ab")]
        ours = ("-m", "orthomerge")
        out = str(Path(scratch) / "out")
        calls = {
            "merge of two tiny adapters": (*ours, "merge", *two, "-o", out, "--overwrite"),
            "diagnose two tiny adapters": (*ours, "diagnose", *two),
            "list": (*ours, "list"),
            "list tasks": (*ours, "list", "tasks"),
            "--help": (*ours, "--help"),
        }
        for call in (TORCH, *calls.values()):  # what is compiled is kept for the next call
            cpu_seconds(call)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        ratios: dict[str, list[float]] = {name: [] for name in calls}
        bare: list[float] = []
        for _ in range(ROUNDS):
            bare.append(cpu_seconds(TORCH))
            for name, call in calls.items():
                taken[name].append(cpu_seconds(call))
                ratios[name].append(taken[name][-1] / bare[-1])
    rows = [
        {
            "work": name,
            "cpu_s": round(statistics.median(taken[name]), 2),
            "ratio": round(statistics.median(ratios[name]), 2),
            "wanted": WANTED.get(name, "–"),
        }
        for name in calls
    ]
    save("startup", rows, torch_s=round(statistics.median(bare), 2))


if __name__ == "__main__":
    main()

"""The whole way at the shape of Llama-3-8B on one GPU: statistics, starts, a step, a merge.

    python -m benchmarks.accelerator         # two minutes on an 80 GB card
    python -m benchmarks.accelerator --device cpu --layers 1 --texts 8    # does it work at all?

The model is random (its weights do not matter for time and memory), in bfloat16; texts are random
tokens. Medians; every figure waits for the device.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.merging import ADAPTERS, make_adapter
from benchmarks.timing import median_seconds, save
from orthomerge.adapters import (
    Directions,
    OsrmConfig,
    Projection,
    initialize_osrm_weights,
    lora_layers,
    merge_adapters,
    new_lora,
)
from orthomerge.moments import Representation, leave_one_out
from orthomerge.statistics import collect_statistics

GIB = 2**30
QV = ["q_proj", "v_proj"]
EVERY = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS, TOKENS, RANK = 8, 128, 16
SHAPE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
# Blocks whose starts are timed, and how many directions each layer is kept out of in the step.
STARTED, EXCLUDED = 4, 512


def random_llama(layers: int, device: str) -> Any:
    """A random decoder of Llama-3-8B's shape with `layers` of its 32 blocks."""
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def texts(task: int, count: int, batch: int = 16) -> list[dict[str, torch.Tensor]]:
    """A task's texts as batches; each task has a tenth of the vocabulary of its own."""
    g = torch.Generator().manual_seed(task)
    ids = 1000 + 12000 * task + torch.randint(12000, (count, TOKENS), generator=g)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)
    ]


def waited(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work, done when the device is."""

    def whole() -> Any:
        found = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    return whole


def peaked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work gives, and the GiB it took on the device beyond what lay there."""
    if not torch.cuda.is_available():
        return work(), 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = waited(work)()
    return found, round((torch.cuda.max_memory_allocated() - before) / GIB, 2)


def collecting(model: Any, count: int) -> list[dict]:
    """Statistics of one task against the bare forward pass."""
    data = texts(0, count)

    def forward() -> None:
        with torch.no_grad():
            for batch in data:
                model.model(**{k: v.to(model.device) for k, v in batch.items()})

    bare = median_seconds(waited(forward), 3)
    rows = []
    for name, targets, form in (
        ("q, v, full moments", QV, Representation("full")),
        ("q, v, rows", QV, Representation("rows")),
        ("all linear layers, sketches of 64", EVERY, Representation("sketch")),
        ("all linear layers, rows", EVERY, Representation("rows")),
    ):

        def collect(targets: list[str] = targets, form: Representation = form) -> Any:
            return collect_statistics(model, data, targets, representation=form)

        _, peak = peaked(collect)
        seconds = median_seconds(waited(collect), 3, warm=False)
        rows.append(
            {"work": f"statistics of {count} texts of {TOKENS} tokens, {name}",
             "seconds": round(seconds, 2), "bare_s": round(bare, 2),
             "ratio": round(seconds / bare, 2), "extra_gib": peak}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def lora(model: Any, targets: list[str]) -> Any:
    """A fresh adapter on the model."""
    return new_lora(model, targets=targets, rank=RANK, alpha=32, task_type="CAUSAL_LM")


def starting(model: Any, count: int) -> list[dict]:
    """A start for one of eight tasks, for the first blocks, against a decomposition a module."""
    blocks = range(min(STARTED, model.config.num_hidden_layers))
    targets = [f"layers.{block}.self_attn.{name}" for block in blocks for name in QV]
    stats = [
        collect_statistics(model, texts(t, count), targets, representation=Representation("full"))
        for t in range(TASKS)
    ]
    peft_model = lora(model, targets)
    rows = []
    for name, config in (
        ("min_eigen (the paper)", OsrmConfig(solver="min_eigen")),
        ("contrastive", OsrmConfig(solver="contrastive")),
    ):

        def start(config: OsrmConfig = config) -> Any:
            return initialize_osrm_weights(peft_model, stats[1:], stats[0], config)

        _, peak = peaked(start)
        seconds = median_seconds(waited(start), 1, warm=False)
        rows.append({"work": f"the start of one task against seven, {name}, q and v of "
                     f"{len(blocks)} blocks", "seconds": round(seconds, 2), "extra_gib": peak}
        )  # fmt: skip
        print(rows[-1], flush=True)
    matrix = leave_one_out([s.moments[next(iter(s.moments))] for s in stats])[0].matrix
    one = median_seconds(waited(lambda: torch.linalg.eigh(matrix)), 1)
    rows.append({"work": f"torch.linalg.eigh of a {len(matrix)} × {len(matrix)} moment, float64, "
                 f"times {len(targets)} modules", "seconds": round(one * len(targets), 1)}
    )  # fmt: skip
    print(rows[-1], flush=True)
    peft_model.unload()
    return rows


def stepping(model: Any) -> dict:
    """A training step of the adapter, and what projecting every `A` after it adds."""
    peft_model = lora(model, QV)
    width, g = model.config.hidden_size, torch.Generator(model.device).manual_seed(0)
    rows: dict[str, torch.Tensor] = {}
    for name in lora_layers(peft_model):  # q and v of a block read one input
        block = name.rsplit(".", 1)[0]
        if block not in rows:
            drawn = torch.randn(width, min(EXCLUDED, width // 2), generator=g, device=model.device)
            rows[block] = torch.linalg.qr(drawn.double()).Q.T
    held = Projection(
        peft_model, Directions({n: rows[n.rsplit(".", 1)[0]] for n in lora_layers(peft_model)})
    )
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    ids = texts(0, 8)[0]["input_ids"].to(model.device)
    peft_model.train()

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16):
            peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _, peak = peaked(step)
    took, apply = median_seconds(waited(step), 5), median_seconds(waited(held.apply), 5)
    return {"work": f"a training step, 8 texts of {TOKENS} tokens, rank {RANK} on q and v",
            "seconds": round(took, 3), "extra_gib": peak, "projection_s": round(apply, 4),
            "share": round(apply / took, 3), "violation": held.violation()}  # fmt: skip


def merging(methods: list[str], device: str) -> list[dict]:
    """Whole adapters, read and written, with the layers worked out on the device."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [str(make_adapter(Path(scratch), seed)) for seed in range(ADAPTERS)]
        for method in methods:
            row: dict[str, Any] = {"work": f"merge of {ADAPTERS} adapters, all seven linears, "
                                   f"{method}, read and written"}  # fmt: skip

            def merge(method: str = method) -> Any:
                return merge_adapters(
                    folders, method=method, rank=RANK, devices=[device],
                    output=Path(scratch) / "out", overwrite=True,
                )  # fmt: skip

            _, row["extra_gib"] = peaked(merge)
            began = time.perf_counter()
            waited(merge)()
            row["seconds"] = round(time.perf_counter() - began, 1)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--texts", type=int, default=96, help="a task")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="*", default=["svd", "tsv_m", "knots_ties", "ties"])
    given = parser.parse_args()
    model = random_llama(given.layers, given.device)
    weights = round(sum(p.numel() * p.element_size() for p in model.parameters()) / GIB, 1)
    rows = collecting(model, given.texts)
    rows += starting(model, given.texts)
    rows.append(stepping(model))
    print(rows[-1], flush=True)
    del model
    rows += merging(given.methods, given.device)
    if given.device != "cpu":
        card = torch.cuda.get_device_name(given.device)
        save("accelerator", rows, card=card, layers=given.layers, weights_gib=weights)


if __name__ == "__main__":
    main()

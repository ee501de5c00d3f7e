"""What collecting costs beside the bare forward pass, beside PEFT's EVA, and in memory.

python benchmarks/statistics.py             # about five minutes on two cores
python benchmarks/statistics.py --blocks    # how the symmetric product is cut
python benchmarks/statistics.py --memory    # only the Llama-8B-shaped part, in this process
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, its own folder comes first, and this file would pass for the standard `statistics`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import resource
import subprocess
import tempfile
import time

import torch

from benchmarks.timing import RESULTS, gflops, median_seconds, paired_ratio, save
from orthomerge.models.assets import resolve_model
from orthomerge.models.loading import load_backbone, load_tokenizer
from orthomerge.moments import KINDS, Representation, SketchMoment, leave_one_out
from orthomerge.statistics import Statistics, StatisticsMeta, batches, collect_statistics
from orthomerge.subspace import get_solver
from orthomerge.tasks import get_task

SAMPLES = 256
RANK = 8


def collecting() -> list[dict]:
    """Token statistics of MiniLM against its forward pass over the same batches."""
    found = resolve_model("minilm")
    model, tokenizer = load_backbone(found.path_or_id).eval(), load_tokenizer(found.path_or_id)
    texts = [(r.text, r.pair) for r in get_task("sentiment").pools()["train"]][:SAMPLES]
    data = list(batches(texts, tokenizer))

    def forward() -> None:
        with torch.no_grad():
            for batch in data:
                model(**batch)

    rows = []
    every = ["query", "key", "value", *_dense(model)]
    for name, targets, kind, wanted in (
        ("q, v", ["query", "value"], "auto", 1.10),
        ("all linear layers of the encoder", every, "auto", 1.35),
        ("all linear layers of the encoder, --representation rows", every, "rows", 1.35),
    ):
        form = Representation(kind)

        def collect(targets: list[str] = targets, form: Representation = form) -> Statistics:
            return collect_statistics(model, data, targets, representation=form)

        kinds = [m.kind for m in collect().moments.values()]
        ours, bare, ratio = paired_ratio(collect, forward, repeats=7)
        rows.append(
            {
                "work": f"collecting token statistics, MiniLM, {name}, {SAMPLES} texts",
                "against": "the bare forward pass",
                "ours_s": round(ours, 3),
                "theirs_s": round(bare, 3),
                "ratio": round(ratio, 3),
                "wanted": wanted,
                "representations": {k: kinds.count(k) for k in KINDS if k in kinds},
            }
        )
    return [*rows, _eva(found.path_or_id, data, 2.0), _eva(found.path_or_id, data, 1.0)]


def _dense(model: torch.nn.Module) -> list[str]:
    """Every dense layer of the encoder by its full name, the pooler left out."""
    return [n for n, _ in model.named_modules() if n.endswith(".dense") and "encoder" in n]


def _eva(path: str, data: list[dict], rho: float) -> dict:
    """PEFT's data-driven start against ours: model, batches, targets and rank the same.

    `rho` 2 is its default (ranks are redistributed), 1 the least it can be asked for.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    targets = ["query", "value"]

    def eva() -> None:
        config = LoraConfig(
            r=RANK, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(rho=rho)
        )
        model = get_peft_model(load_backbone(path), config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(model, data, show_progress_bar=False)

    def ours() -> None:
        model = load_backbone(path).eval()
        found = collect_statistics(model, data, targets)
        solver = get_solver("min_eigen")
        for moment in found.moments.values():
            solver(moment, RANK)

    return _timed(
        "statistics and min_eigen, MiniLM, q, v, rank 8",
        f"peft.initialize_lora_eva_weights, rho={rho:g}{' (its default)' if rho == 2 else ''}",
        ours,
        eva,
        0.5,
    )


def _timed(work: str, against: str, ours, theirs, wanted: float) -> dict:
    mine, other, ratio = paired_ratio(ours, theirs)
    return {
        "work": work,
        "against": against,
        "ours_s": round(mine, 2),
        "theirs_s": round(other, 2),
        "ratio": round(ratio, 3),
        "wanted": wanted,
    }


# The distinct inputs of a Llama-3-8B block: q/k/v, o, gate/up, down.
LLAMA = {"self_attn.q_proj": 4096, "self_attn.o_proj": 4096, "mlp.gate_proj": 4096,
         "mlp.down_proj": 14336}  # fmt: skip


def memory(layers: int, tasks: int, tokens: int, size: int) -> dict:
    """Peak memory of sketching every input of a Llama-8B and solving, beyond the imports."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(512, 14336, generator=generator) @ torch.randn(14336, 8)  # the libraries' own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            _sketch_task(Path(folder) / f"{t}.stats.safetensors", layers, tokens, size, generator)
            for t in range(tasks)
        ]
        collected = time.perf_counter() - began
        stats = [Statistics.load(p, lazy=True) for p in paths]
        solver = get_solver("null_space")
        worst = 0.0
        for lead in stats[0].moments:
            moments = [s.moments[lead] for s in stats]
            for t, other in enumerate(leave_one_out(moments)):
                found = solver(other, RANK, own=moments[t], tie="own")
                worst = max(worst, found.captured_other / found.total_other)
        disk = sum(p.stat().st_size for p in paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "work": f"sketches of size {size}, every linear layer of a Llama-8B shape ({layers} "
        f"layers), {tasks} tasks, {tokens} rows each, and a start for each",
        "against": "peak memory beyond the imports",
        "ours_gib": round(peak / 1024**2, 2),
        "wanted_gib": 2.0,
        "collect_s": round(collected, 1),
        "solve_s": round(time.perf_counter() - began - collected, 1),
        "disk_gib": round(disk / 1024**3, 2),
        "captured": worst,
    }


def _sketch_task(
    path: Path, layers: int, tokens: int, size: int, generator: torch.Generator
) -> Path:
    """One task, all its sketches in memory at once, as in a real pass; activations one by one."""
    moments = {}
    for layer in range(layers):
        for name, width in LLAMA.items():
            sketch = moments[f"layers.{layer}.{name}"] = SketchMoment(width, size)
            for _ in range(0, tokens, 512):
                sketch.update(torch.randn(512, width, generator=generator))
    meta = StatisticsMeta("llama-8b-shape", "0", list(LLAMA), "token", tokens)
    return Statistics(moments, {n: n for n in moments}, meta).save(path)


def blocks() -> list[dict]:
    """Seconds of the symmetric product by the number of columns taken at a time."""
    from orthomerge.moments import full

    rows = []
    for width, count in ((384, 1000), (1536, 1000), (4096, 1000)):
        data = torch.randn(count, width)
        for block in (64, 96, 128, 256, width):
            full._BLOCK = block
            moment = full.SecondMoment(width)
            seconds = median_seconds(lambda m=moment, h=data: m.update(h), 11)
            rows.append(
                {"width": width, "rows": count, "block": block, "ms": round(1e3 * seconds, 2)}
            )
    return rows


def main() -> None:
    """Run all and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--keep-memory", action="store_true", help="keep the last memory figure")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--size", type=int, default=64)
    a = parser.parse_args()
    if a.blocks:
        for row in blocks():
            print(row)
    elif a.memory:
        print(json.dumps(memory(a.layers, a.tasks, a.tokens, a.size)))
    else:
        table = collecting()
        if a.keep_memory:
            kept = json.loads((RESULTS / "statistics.json").read_text(encoding="utf-8"))
            save("statistics", [*table, kept["rows"][-1]], roof_gflops=round(gflops(), 1))
            return
        # In a process of its own: the peak of this one has other reasons.
        command = [sys.executable, __file__, "--memory"]
        for name in ("layers", "tasks", "tokens", "size"):
            command += [f"--{name}", str(getattr(a, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        table.append(json.loads(done.stdout.splitlines()[-1]))
        save("statistics", table, roof_gflops=round(gflops(), 1))


if __name__ == "__main__":
    main()

"""A merge written as a full model: time and peak memory against PEFT's merge_and_unload.

    python -m benchmarks.full_model       # five minutes, 11 GB of disk, deleted afterwards

The checkpoint has the layers of Llama-3-8B, fewer of them, random in bfloat16, in shards of about
the third part of the model, as on the hub. Each side runs in a process of its own and reports its
peak of resident memory, imports and all; two layers of either are compared with the exact sum.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.timing import save
from orthomerge.adapters import read_adapter
from orthomerge.adapters.full_model import save_full_model
from orthomerge.merging import plan_merge

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GIB = 2**30


def config(layers: int) -> LlamaConfig:
    """Llama-3-8B but for the number of layers."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def shapes(layers: int) -> dict[str, torch.Size]:
    """Every tensor of the model, none of them made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(layers))
    return {key: value.shape for key, value in model.state_dict().items()}


def make_base(folder: Path, layers: int, shard: int) -> None:
    """Random shards of about `shard` bytes, written one after the other."""
    folder.mkdir()
    config(layers).save_pretrained(folder)
    noise = 0.02 * torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0))
    noise = noise.bfloat16()  # repeated: drawing all of it would take minutes
    groups: list[dict[str, torch.Size]] = [{}]
    size = 0
    for key, shape in shapes(layers).items():
        if size and size + 2 * shape.numel() > shard:
            groups.append({})
            size = 0
        groups[-1][key] = shape
        size += 2 * shape.numel()
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            key: noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()].view(shape).clone()
            for key, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total_size(folder)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapters(folder: Path, layers: int, count: int, rank: int) -> None:
    """Adapters of all seven linears of every layer."""
    adapted = {
        key.removesuffix(".weight"): shape
        for key, shape in shapes(layers).items()
        if key.split(".")[-2] in TARGETS
    }
    for number in range(count):
        generator = torch.Generator().manual_seed(1 + number)
        tensors = {}
        for name, (d_out, d_in) in adapted.items():
            stem = f"base_model.model.{name}.lora_"
            A = torch.randn(rank, d_in, generator=generator)
            tensors[f"{stem}A.weight"] = A / d_in**0.5
            tensors[f"{stem}B.weight"] = 0.02 * torch.randn(d_out, rank, generator=generator)
        path = folder / f"a{number}"
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        settings.base_model_name_or_path = str(folder / "base")
        settings.save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def ours(folder: Path, adapters: list[Path], weight: float) -> None:
    """Our exact sum, streamed into the base's shards."""
    plan = plan_merge([read_adapter(a).layers for a in adapters], weights=weight)
    save_full_model(
        folder / "ours", folder / "base", lambda name: plan.merge(name).update, names=plan.names
    )


def theirs(folder: Path, adapters: list[Path], weight: float) -> None:
    """PEFT's exact sum, merged into the model in memory and saved."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    model.base_model.add_weighted_adapter(
        names, [weight] * len(names), "sum", combination_type="cat"
    )
    model.set_adapter("sum")
    merged = model.merge_and_unload()
    largest = max(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    merged.save_pretrained(folder / "theirs", max_shard_size=largest)


def peak_memory() -> int:
    """The most resident memory this process ever had, in bytes (Linux).

    Not `ru_maxrss`, which a child takes over from the process that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def child(side: str, folder: Path, weight: float) -> None:
    """One side, in this process: what it took, as a line of JSON."""
    imports = peak_memory()
    began = time.perf_counter()
    adapters = sorted(folder.glob("a[0-9]*"))
    (ours if side == "ours" else theirs)(folder, adapters, weight)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": peak_memory(), "imports": imports}))


def measure(side: str, folder: Path, weight: float) -> dict[str, float]:
    """One side in a process of its own, its output made anew."""
    shutil.rmtree(folder / side, ignore_errors=True)
    command = [*(sys.executable, "-m", "benchmarks.full_model", "--child", side)]
    command += ["--folder", str(folder), "--weight", str(weight)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def total_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tensor(folder: Path, key: str) -> torch.Tensor:
    """One tensor of a model folder, in float64."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][key], framework="pt") as file:
        return file.get_tensor(key).double()


def errors(folder: Path, weight: float) -> dict[str, float]:
    """How far two layers of either output are from the exact sum, relative to the update."""
    layers = [read_adapter(path).layers for path in sorted(folder.glob("a[0-9]*"))]
    found = {"ours": 0.0, "theirs": 0.0}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = f"model.layers.0.{name}"
        update = sum(weight * a[layer].to(torch.float64).delta() for a in layers)
        assert isinstance(update, torch.Tensor)
        exact = tensor(folder / "base", f"{layer}.weight") + update
        for side in found:
            apart = (tensor(folder / side, f"{layer}.weight") - exact).norm() / update.norm()
            found[side] = max(found[side], float(apart))
    return found


def main() -> None:
    """Make the checkpoint, run both sides in turns, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weight", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    parser.add_argument("--child", choices=["ours", "theirs"])
    a = parser.parse_args()
    if a.child:
        child(a.child, a.folder, a.weight)
        return
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        size = sum(2 * shape.numel() for shape in shapes(a.layers).values())
        make_base(folder / "base", a.layers, size // 3)
        make_adapters(folder, a.layers, a.adapters, a.rank)
        runs: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        for _ in range(a.repeats):
            for side, found in runs.items():
                found.append(measure(side, folder, a.weight))
        shard = max(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        apart = errors(folder, a.weight)
    seconds = {s: statistics.median(r["seconds"] for r in found) for s, found in runs.items()}
    peaks = {s: max(r["peak"] for r in found) / GIB for s, found in runs.items()}
    row = {
        "work": f"{a.adapters} adapters of rank {a.rank}, all seven linears, into {a.layers} "
        f"layers of Llama-3-8B's shape, bfloat16, {size / GIB:.1f} GiB",
        "against": "PEFT, cat, merge_and_unload, save_pretrained",
        "ours_gib": round(peaks["ours"], 2),
        "theirs_gib": round(peaks["theirs"], 2),
        "wanted_gib": round(shard / GIB + 1, 2),
        "shard_gib": round(shard / GIB, 2),
        "imports_gib": round(max(r["imports"] for r in runs["ours"]) / GIB, 2),
        "ours_s": round(seconds["ours"], 1),
        "theirs_s": round(seconds["theirs"], 1),
        "ratio": round(seconds["theirs"] / seconds["ours"], 2),
        "ours_error": apart["ours"],
        "theirs_error": apart["theirs"],
    }
    save("full_model", [row])


if __name__ == "__main__":
    main()

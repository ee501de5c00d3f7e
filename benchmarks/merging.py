"""Merging on the factors against PEFT and against the dense form of every method.

    python -m benchmarks.merging             # ratios at d=2048, 8 adapters of rank 16
    python -m benchmarks.merging --device cuda    # the same on a GPU, kept apart
    python -m benchmarks.merging --methods   # time and memory of every method on one such layer
    python -m benchmarks.merging --whole     # whole adapters of Llama-3-8B shape, time and memory

The dense side is what the papers' own code does: an SVD of the dense updates or of their
concatenation. Every ratio is of one run; both results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import median_seconds, save
from orthomerge.factors import LoraFactors
from orthomerge.merging import get_method, list_methods, merge_layers
from orthomerge.moments import RowMoment

ADAPTERS, RANK, D = 8, 16, 2048
# Llama-3-8B: layer name -> (d_out, d_in), 32 blocks.
LLAMA = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
BLOCKS = 32
GIB = 2**30
DEVICE = torch.device("cpu")


def factors(seed: int, d_out: int = D, d_in: int = D, dtype: torch.dtype = torch.float32):
    """One random adapter of a layer, its singular values falling as trained ones do."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, d_in, generator=g) / d_in**0.5
    B = torch.randn(d_out, RANK, generator=g) * torch.logspace(0, -1.5, RANK)
    return LoraFactors(A.to(DEVICE, dtype), B.to(DEVICE, dtype), 2.0)


class Holder(nn.Module):
    """One linear layer for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)


def peft_model(adapters: Sequence[LoraFactors]):
    """The adapters on one layer of PEFT."""
    from peft import LoraConfig, get_peft_model

    model = None
    for number, f in enumerate(adapters):
        config = LoraConfig(r=RANK, lora_alpha=RANK * f.scaling, target_modules=["layer"])
        if model is None:
            model = get_peft_model(Holder().to(DEVICE), config, adapter_name=f"a{number}")
        else:
            model.add_adapter(f"a{number}", config)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for number, f in enumerate(adapters):
            layer.lora_A[f"a{number}"].weight.copy_(f.A)
            layer.lora_B[f"a{number}"].weight.copy_(f.B)
    return model, layer


def relative(a: Tensor, b: Tensor) -> float:
    """`‖a - b‖ / ‖b‖`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def done(work: Callable[[], object]) -> None:
    """Work, to its end on the device."""
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    done(work)
    return time.perf_counter() - began


def median_of(work: Callable[[], object], repeats: int, *known: float) -> float:
    """Median seconds of `repeats` calls, or of as many as half a minute holds."""
    found = list(known)
    while (len(found) < repeats and sum(found) < 30) or not found:
        found.append(seconds_of(work))
    return sorted(found)[len(found) // 2]


def ours_seconds(work: Callable[[], object]) -> float:
    """Median seconds of five calls."""
    return median_seconds(lambda: done(work))


def against_peft(combination: str, method: str, repeats: int, **options) -> dict:
    """One of PEFT's combinations and ours on the same layer."""
    adapters = [factors(i) for i in range(ADAPTERS)]
    model, layer = peft_model(adapters)
    names, weights = [f"a{i}" for i in range(ADAPTERS)], [1.0] * ADAPTERS
    density = {"density": 0.2} if "ties" in combination else {}

    def theirs() -> None:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.base_model.add_weighted_adapter(
            names, weights, "merged", combination_type=combination, svd_rank=RANK, **density
        )

    def ours() -> None:
        merge_layers([{"layer": f} for f in adapters], method=method, rank=RANK, **options)

    first = seconds_of(theirs)
    merged = merge_layers([{"layer": f} for f in adapters], method=method, rank=RANK, **options)
    difference = relative(merged.dense("layer"), layer.get_delta_weight("merged").detach())
    return {"theirs_s": median_of(theirs, repeats, first), "ours_s": ours_seconds(ours),
            "difference": difference}  # fmt: skip


def elect(updates: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """TIES of dense tensors."""
    kept = []
    for u in updates:
        flat = u.abs().flatten()
        at = flat.topk(int(density * len(flat))).indices
        mask = torch.zeros_like(flat).scatter_(0, at, 1.0)
        kept.append(u * mask.view_as(u))
    stack = torch.stack(kept)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == sign
    return torch.where(agree, stack, 0.0).sum(0) / agree.sum(0).clamp(min=1)


def polar(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return P @ Qh


def dense_knots(updates: Sequence[Tensor], inner: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    U, s, Vh = torch.linalg.svd(torch.cat(list(updates), 1), full_matrices=False)
    k = ADAPTERS * RANK
    rows = (s[:k, None] * Vh[:k]).split(D, dim=1)
    return U[:, :k] @ inner(rows)


def dense_tsv(updates: Sequence[Tensor]) -> Tensor:
    us, ss, vs = [], [], []
    for u in updates:
        U, s, Vh = torch.linalg.svd(u, full_matrices=False)
        us.append(U[:, :RANK])
        ss.append(s[:RANK])
        vs.append(Vh[:RANK].T)
    return polar(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ polar(torch.cat(vs, 1)).T


def dense_iso(updates: Sequence[Tensor]) -> Tensor:
    U, s, Vh = torch.linalg.svd(sum(updates), full_matrices=False)
    k = ADAPTERS * RANK
    return s[:k].mean() * U[:, :k] @ Vh[:k]


def dense_iso_cts(updates: Sequence[Tensor], fraction: float = 0.8) -> Tensor:
    U, s, Vh = torch.linalg.svd(sum(updates), full_matrices=False)
    K = ADAPTERS * RANK
    each = round((K - int(K * fraction)) / ADAPTERS)
    k = K - each * ADAPTERS
    us, ss, vs = [U[:, :k]], [s[:k]], [Vh[:k].T]
    for u in updates:
        Ui, si, Vi = torch.linalg.svd(u - U[:, :k] @ (U[:, :k].T @ u), full_matrices=False)
        us.append(Ui[:, :each])
        ss.append(si[:each])
        vs.append(Vi[:each].T)
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 1)).T


def dense_core(updates: Sequence[Tensor]) -> Tensor:
    """Core space with its bases taken from the dense updates, as if the factors were not known."""
    k = ADAPTERS * RANK
    U = torch.linalg.svd(torch.cat(list(updates), 1), full_matrices=False).U[:, :k]
    V = torch.linalg.svd(torch.cat(list(updates), 0), full_matrices=False).Vh[:k].T
    return U @ elect([U.T @ u @ V for u in updates]) @ V.T


# Methods whose bases are fixed up to signs agree to rounding; those that then trim entry by entry
# agree as far as the bases do, which for core space are other ones.
DENSE: dict[str, tuple[Callable[[Sequence[Tensor]], Tensor], bool]] = {
    "knots_ties": (lambda u: dense_knots(u, elect), True),
    "core_space": (dense_core, False),
    "tsv_m": (dense_tsv, True),
    "iso_c": (dense_iso, True),
    "iso_cts": (dense_iso_cts, True),
}


def against_dense(method: str, repeats: int) -> dict:
    """A method on the factors and on the dense updates."""
    adapters = [factors(i) for i in range(ADAPTERS)]
    form, comparable = DENSE[method]

    def theirs() -> Tensor:
        return form([f.delta() for f in adapters])

    def ours():
        return merge_layers([{"layer": f} for f in adapters], method=method)

    dense = theirs()
    difference = relative(ours().dense("layer"), dense) if comparable else None
    return {"theirs_s": median_of(theirs, repeats), "ours_s": ours_seconds(ours),
            "difference": difference}  # fmt: skip


def ratios(repeats: int) -> list[dict]:
    rows = []
    for work, combination, method, wanted, options in (
        ("svd", "svd", "svd", 500, {}),
        ("ties_svd", "ties_svd", "ties", 20, {"density": 0.2}),
    ):
        found = against_peft(combination, method, repeats, **options)
        rows.append(_row(work, f"PEFT `{combination}`", found, wanted))
        print(json.dumps(rows[-1]), flush=True)
    for method in DENSE:
        found = against_dense(method, repeats)
        rows.append(_row(method, "its dense form", found, 20))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(work: str, against: str, found: dict, wanted: int) -> dict:
    difference = found["difference"]
    return {
        "work": work,
        "against": against,
        "ours_s": float(f"{found['ours_s']:.3g}"),
        "theirs_s": float(f"{found['theirs_s']:.3g}"),
        "ratio": float(f"{found['theirs_s'] / found['ours_s']:.3g}"),
        "wanted": wanted,
        "difference": None if difference is None else float(f"{difference:.1g}"),
    }


# Whole adapters ---------------------------------------------------------------------------------


def make_adapter(folder: Path, seed: int) -> Path:
    """A random bf16 adapter of Llama-3-8B shape, all seven linears, as a PEFT folder."""
    from orthomerge.adapters.write import AdapterWriter, Frame

    layers = {
        f"model.layers.{block}.{name}": shape
        for block in range(BLOCKS)
        for name, shape in LLAMA.items()
    }
    path = folder / f"a{seed}"
    with AdapterWriter(path, layers, Frame("llama-3-8b-shape")) as writer:
        for number, (name, shape) in enumerate(layers.items()):
            writer.add(name, factors(1000 * seed + number, *shape, dtype=torch.bfloat16))
    return path


def child(method: str, folders: Sequence[str], workers: int) -> None:
    """Merge the folders into one as the command does, and print time and peak memory."""
    from orthomerge.adapters import merge_adapters

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = Path(folders[0]).parent / "merged"
    began = time.perf_counter()
    merge_adapters(folders, method=method, output=output, workers=workers, overwrite=True)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extra = round((peak - before) * 1024 / GIB, 2)
    print(json.dumps({"seconds": round(seconds, 1), "extra_gib": extra}))


def whole(methods: Sequence[str], workers: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [str(make_adapter(Path(scratch), seed)) for seed in range(ADAPTERS)]
        for method in methods:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.merging", "--child", method,
                 "--workers", str(workers), *folders],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rows.append({"method": method, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def every_method() -> list[dict]:
    """Time and memory of every method on one layer, each in a process of its own."""
    rows = []
    for method in list_methods():
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.merging", "--one", method.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows.append({"method": method.name, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Rows:
    """A task's statistics on one layer: 1,600 rows, as of a hundred short texts."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self._moment = RowMoment.from_rows(torch.randn(1600, D, generator=g).double())

    def moment(self, layer: str) -> RowMoment:
        return self._moment


def one(name: str) -> None:
    """Merge one layer by a method and print its time and the memory it took."""
    method = get_method(name)
    count = 2 if name == "slerp" else ADAPTERS
    adapters = [{"layer": factors(i)} for i in range(count)]
    given: dict = {}
    if "moments" in method.needs:
        given["statistics"] = [Rows(i) for i in range(count)]
    if "fisher" in method.needs:
        given["fisher"] = [{"layer": torch.rand(D, D)} for _ in range(count)]
    merge_layers([{"layer": factors(9, 64, 64)}] * 2, method="svd")  # the libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = median_seconds(lambda: merge_layers(adapters, method=name, **given), 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": float(f"{seconds:.2g}"), "extra_mib": (peak - before) // 1024}))


def factor_methods() -> list[str]:
    """Methods that keep factors and take the adapters alone; slerp takes two."""
    return [m.name for m in list_methods() if m.low_rank and not m.needs and m.name != "slerp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the ratios: cpu or cuda")
    parser.add_argument("names", nargs="*", help="methods of --whole; folders of --child")
    given = parser.parse_args()
    if given.child:
        child(given.child, given.names, given.workers)
    elif given.one:
        one(given.one)
    elif given.methods:
        save("merging-methods", every_method(), adapters=ADAPTERS, rank=RANK, d=D)
    elif given.whole:
        rows = whole(given.names or factor_methods(), given.workers)
        save("merging-whole", rows, workers=given.workers, adapters=ADAPTERS, rank=RANK)
    else:
        global DEVICE
        DEVICE, about = torch.device(given.device), {"adapters": ADAPTERS, "rank": RANK, "d": D}
        name = "merging"
        if DEVICE.type == "cuda":
            name, about["card"] = "merging-gpu", torch.cuda.get_device_name(DEVICE)
        save(name, ratios(given.repeats), **about)


if __name__ == "__main__":
    main()

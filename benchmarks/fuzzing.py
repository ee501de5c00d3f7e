"""Broken files by the thousand, in process: only `OrthomergeError` may come out, and no half file.

python -m benchmarks.fuzzing --inputs 100000    # writes benchmarks/results/fuzz.json, docs/trust.md

A seeded mutator of our own: an honest value is taken, values of it are replaced by nasty ones (or
left out, renamed, repeated), and every few times bytes of the file are flipped, cut or doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save, save_file

from orthomerge import Statistics, merge_adapters, verify
from orthomerge.cli._app import parse_numbers, parse_options
from orthomerge.errors import OrthomergeError
from orthomerge.experiment.recipe import load_recipe, packaged_recipes
from orthomerge.factors import LoraFactors
from orthomerge.features.meta import StatisticsMeta
from orthomerge.files import fingerprint
from orthomerge.merging import list_methods, merge_layers
from orthomerge.moments import SecondMoment, SketchMoment
from orthomerge.report import summarize
from orthomerge.rows import ResultRow, read_rows

RESULT = Path(__file__).parent / "results" / "fuzz.json"
PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
MARK, END = "<!-- written by make fuzz -->", "<!-- end -->"
LIMIT_S, MEMORY = 5, 16 * 2**30
TARGETS = 7
_NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 2**62, 10**30, -(10**18), 0.5, -0.0, 1e308, 1e-308,
    float("nan"), float("inf"), float("-inf"), "", "x", "../../x", "/etc/passwd", "a\\b", "\x00",
    "é\u202e", "x" * 3000, "1e999", "(a+)+$", "[", [], {}, [[]], [1] * 1000, {"": None},
    {"a": {"a": {"a": {}}}}, [None, "a", 1], "F64", "I8", [2**31, 2**31], [0, 0], "LORA", "ties",
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        value = _change(value, rng)
    return value


def _change(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.08:
        if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
            return value * rng.choice([-1, 2, 10, 0.5, 2**20]) + rng.choice([-1, 0, 1])
        return copy.deepcopy(rng.choice(_NASTY))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[str(rng.choice(_NASTY))[:200]] = value.pop(key)
    elif kind < 0.25 and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    else:
        value[key] = _change(value[key], rng)
    return value


def scratched(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(4)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at : at + rng.randint(1, 40)]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found[at:at] = rng.choice([b"\x00", b"\xff", b'"', b"{", b"[" * 200, b"9" * 40, b"\n"])
    return bytes(found)


def _json(value: Any, rng: random.Random) -> bytes:
    data = json.dumps(mutated(value, rng)).encode()
    return scratched(data, rng) if rng.random() < 0.2 else data


def _header(data: bytes, rng: random.Random, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with its header changed, its length often told as it is."""
    (size,) = struct.unpack("<Q", data[:8])
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    text += b" " * (-len(text) % 8)
    told = len(text) if rng.random() < 0.95 else rng.choice([0, 1, 2**20, 2**40, 2**63])
    made = struct.pack("<Q", told) + text + data[8 + size :]
    return scratched(made, rng) if rng.random() < 0.2 else made


class Target(NamedTuple):
    """A kind of input: its share of all inputs, and what makes and reads one."""

    name: str
    share: float
    once: Callable[[random.Random], None]


def targets(root: Path) -> list[Target]:
    """All kinds, with honest files under `root`."""
    return [
        Target("adapter_config.json", 0.06, _adapter_config(root / "config")),
        Target("adapter_model.safetensors", 0.19, _adapter_weights(root / "weights")),
        Target("statistics files", 0.17, _statistics(root / "stats")),
        Target("recipes", 0.04, _recipe(root / "recipe")),
        Target("weights and options", 0.25, _options()),
        Target("merge.json", 0.09, _record(root / "record")),
        Target("results.jsonl", 0.2, _rows(root / "rows")),
    ]


_NAME = "encoder.layer.0.attention.self.query"
_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"],
    "rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.0.*query": 8}, "use_rslora": False,
    "base_model_name_or_path": "tiny", "task_type": "SEQ_CLS", "modules_to_save": ["classifier"],
    "bias": "none", "use_dora": False, "init_lora_weights": True, "fan_in_fan_out": False,
}  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    g, start = torch.Generator().manual_seed(0), f"base_model.model.{_NAME}.lora_"
    return {
        f"{start}A.weight": torch.randn(2, 4, generator=g),
        f"{start}B.weight": torch.randn(6, 2, generator=g),
        "base_model.model.classifier.weight": torch.randn(2, 6, generator=g),
    }


def _adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(_tensors(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_CONFIG))
    return folder


def _merged(root: Path, adapter: Path) -> None:
    """Merge it into a folder, which is there whole or not at all."""
    out, before = root / "out", {p.name for p in root.iterdir()}
    try:
        merge_adapters([adapter], output=out)
    except OrthomergeError:
        left = {p.name for p in root.iterdir()} - before
        assert not left, f"left behind: {left}"
        raise
    assert all(c.good for c in verify(out))
    shutil.rmtree(out)


def _adapter_config(root: Path) -> Callable[[random.Random], None]:
    adapter = _adapter(root / "a")

    def once(rng: random.Random) -> None:
        (adapter / "adapter_config.json").write_bytes(_json(_CONFIG, rng))
        _merged(root, adapter)

    return once


def _adapter_weights(root: Path) -> Callable[[random.Random], None]:
    adapter, honest = _adapter(root / "a"), save(_tensors())

    def once(rng: random.Random) -> None:
        data = _header(honest, rng, lambda header: mutated(header, rng))
        (adapter / "adapter_model.safetensors").write_bytes(data)
        _merged(root, adapter)

    return once


def _statistics(root: Path) -> Callable[[random.Random], None]:
    root.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6, generator=g)
    moments = {"a": SecondMoment(6).update(rows), "b": SketchMoment(6, 4).update(rows)}
    meta = StatisticsMeta("tiny", "c" * 64, ["a", "b"], "token", 20)
    path = Statistics(moments, {"a": "a", "b": "b", "c": "a"}, meta).save(root / "s.safetensors")
    honest = path.read_bytes()

    def once(rng: random.Random) -> None:
        def change(header: Any) -> Any:
            content = json.loads(header["__metadata__"]["orthomerge"])
            content.pop("sha256")
            if rng.random() < 0.7:  # with the hash made anew, as a stranger can
                content = mutated(content, rng)
            else:
                header = mutated(header, rng)
            if isinstance(header, dict) and isinstance(content, dict):
                with contextlib.suppress(UnicodeEncodeError):
                    content = {"sha256": fingerprint(content), **content}
                header["__metadata__"] = {"orthomerge": json.dumps(content)}
            return header

        path.write_bytes(_header(honest, rng, change))
        statistics = Statistics.load(path)
        for layer in statistics.layers:
            statistics.second_moment(layer)

    return once


def _recipe(root: Path) -> Callable[[random.Random], None]:
    root.mkdir()
    honest = yaml.safe_load(packaged_recipes()["demo.yaml"].read_text(encoding="utf-8"))

    def once(rng: random.Random) -> None:
        data = yaml.safe_dump(mutated(honest, rng), allow_unicode=True).encode()
        data = scratched(data, rng) if rng.random() < 0.3 else data
        (root / "r.yaml").write_bytes(data)
        load_recipe(root / "r.yaml")

    return once


def _options() -> Callable[[random.Random], None]:
    g = torch.Generator().manual_seed(0)
    pair = [
        {_NAME: LoraFactors(torch.randn(2, 4, generator=g), torch.randn(6, 2, generator=g))}
        for _ in range(2)
    ]
    methods = [m for m in list_methods() if not m.needs and not m.open_options]

    def once(rng: random.Random) -> None:
        method = rng.choice(methods)
        key = rng.choice([*method.options, "density", "x"])
        value = rng.choice([*map(str, _NASTY), *(str(v) for v in method.options.values())])
        options = parse_options([f"{key}={value}"])
        text = ",".join(str(rng.choice([1, 0.5, -1, *_NASTY]))[:40] for _ in range(2))
        weights = parse_numbers(text, "weights") if rng.random() < 0.5 else [1.0, 0.5]
        taken = {"method", "weights", "layer_weights", "rank", "seed", "statistics", "fisher"}
        options = {k: v for k, v in options.items() if k not in taken}
        merged = merge_layers(pair, method=method.name, weights=weights, **options)
        assert merged.dense(_NAME).shape == (6, 4)

    return once


def _record(root: Path) -> Callable[[random.Random], None]:
    adapter = _adapter(root / "a")
    merge_adapters([adapter], output=root / "out")
    file = root / "out" / "merge.json"
    honest = json.loads(file.read_text())

    def once(rng: random.Random) -> None:
        file.write_bytes(_json(honest, rng))
        before = {p.name for p in root.iterdir()}
        try:
            verify(root / "out", redo=rng.random() < 0.2, adapters=[adapter])
        finally:
            assert {p.name for p in root.iterdir()} == before

    return once


def _rows(root: Path) -> Callable[[random.Random], None]:
    root.mkdir()
    honest = [
        json.loads(
            ResultRow(task, "a", "default", None, None, "init", 0.1, method, weight, "accuracy",
                      0.5, 0, 10, "test", f"{task}{method}").to_json()
        )
        for task in ("x", "y") for method, weight in (("single", None), ("linear", 1.0))
    ]  # fmt: skip

    def once(rng: random.Random) -> None:
        changed = mutated(honest, rng)
        changed = changed if isinstance(changed, list) else [changed]
        data = "\n".join(json.dumps(row) for row in changed).encode() + b"\n"
        data = scratched(data, rng) if rng.random() < 0.3 else data
        (root / "results.jsonl").write_bytes(data)
        rows = read_rows(root / "results.jsonl")
        if rows:
            summarize(rows)

    return once


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Memory is bounded while it runs, and no input takes more than its time."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    target: Target, inputs: int, seed: int = 0, seconds: float = float("inf")
) -> dict[str, Any]:
    """How many inputs were accepted, refused in a sentence, or came out as anything else."""
    found: dict[str, Any] = {"target": target.name, "inputs": 0, "accepted": 0, "refused": 0}
    uncaught: dict[str, int] = {}
    slowest, end = 0.0, time.monotonic() + seconds
    with _bounded():
        for number in range(inputs):
            if time.monotonic() > end:
                break
            found["inputs"] += 1
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
            clock = time.thread_time()
            try:
                target.once(random.Random(f"{seed} {target.name} {number}"))
                found["accepted"] += 1
            except OrthomergeError:
                found["refused"] += 1
            except Exception as problem:
                uncaught.setdefault(f"{type(problem).__name__}: {str(problem)[:100]}", number)
            slowest = max(slowest, time.thread_time() - clock)
    return {**found, "uncaught": found["inputs"] - found["accepted"] - found["refused"],
            "slowest_s": round(slowest, 3), "problems": uncaught}  # fmt: skip


def _one(place: int, inputs: int, seed: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as at:
        target = targets(Path(at))[place]
        found = fuzz(target, round(inputs * target.share), seed, seconds)
    print(found, flush=True)
    return found


def page() -> str:
    """The table of docs/trust.md, from the result file alone."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = ["| target | inputs | accepted | refused | uncaught | slowest, s |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    total = dict.fromkeys(("inputs", "accepted", "refused", "uncaught"), 0)
    for row in result["targets"]:
        total = {key: value + row[key] for key, value in total.items()}
        lines.append(_line(f"`{row['target']}`", row, row["slowest_s"]))
    lines.append(_line("all", total, max(row["slowest_s"] for row in result["targets"])))
    return "\n".join(lines)


def _line(name: str, row: dict[str, int], slowest: float) -> str:
    numbers = " | ".join(f"{row[k]:,}" for k in ("inputs", "accepted", "refused", "uncaught"))
    return f"| {name} | {numbers} | {slowest:.3f} |"


def write_page() -> None:
    """Put the table into docs/trust.md, between its two marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARK + "\n", 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{MARK}\n{page()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, a target")
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_one, place, asked.inputs, asked.seed, asked.seconds)
            for place in range(TARGETS)
        ]
        found = [job.result() for job in jobs]
    RESULT.write_text(json.dumps({"seed": asked.seed, "targets": found}, indent=2) + "\n")
    write_page()


if __name__ == "__main__":
    main()

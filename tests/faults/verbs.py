"""Every verb that writes an output, killed, asked to end or refused at every operation on the disk.

    python tests/faults/verbs.py FOLDER [--points 4]

At its output is something old. After each fault there is all of the old or all of the new; the
same call, without a fault, then succeeds and leaves nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch

torch.set_num_threads(1)
from conftest import call, make_base, make_tokenizer, write_task
from ending import ending_of
from injection import disk, end, kill, refuse, watch
from safetensors.torch import save_file
from small_adapters import make_adapter

from orthomerge.cli import _app
from orthomerge.fisher import file as fisher
from orthomerge.io.names import MERGE, START, TRAINING
from orthomerge.records import seal
from orthomerge.statistics import file as statistics

FAULTS = {"SIGKILL": kill, "SIGTERM": end, "ENOSPC": refuse(errno.ENOSPC)}
# What a verb's own clock or path says, and a study, which grows trial by trial.
PASSING = (".db", ".lock")


def verbs(top: Path, base: Path) -> dict[str, tuple[list[Any], Path]]:
    """The calls by name, each with the output that is looked at."""
    for seed, name in enumerate("ab"):
        make_adapter(top / name, base, seed)
        write_task(top / f"{name}.jsonl", 600, seed=seed)
        call(
            "stats", base, "--data", top / f"{name}.jsonl", "--samples", 8, "-o", _stats(top, name)
        )
    call("init", base, "--others", _stats(top, "b"), "--rank", 2, "-o", top / "s")
    a, b, out = top / "a", top / "b", top / "out"
    stats = ["--stats", _stats(top, "a"), "--stats", _stats(top, "b")]
    return {
        "stats": (
            ["stats", base, "--data", top / "a.jsonl", "--samples", 8, "-o", out / "x"], out / "x",
        ),
        "init": (
            ["init", base, "--others", _stats(top, "b"), "--rank", 2, "-o", out / "x"], out / "x",
        ),
        "train": (
            ["train", top / "s", "--task", top / "a.jsonl", "--rows", 16, "--epochs", 1,
             "--overwrite", "-o", out / "x"], out / "x",
        ),
        "merge": (["merge", a, b, "--overwrite", "-o", out / "x"], out / "x"),
        "merge --save-as full": (
            ["merge", a, b, "--save-as", "full", "--overwrite", "-o", out / "x"], out / "x",
        ),
        "convert": (["convert", a, b, *stats, "--overwrite", "-o", out / "x"], out / "x"),
        "fisher": (
            ["stats", "fisher", a, "--task", top / "a.jsonl", "--samples", 8,
             "-o", out / "x"], out / "x",
        ),
        "tune": (
            ["tune", a, b, "--task", top / "a.jsonl", "--task", top / "b.jsonl", "--trials", 2,
             "--rows", 16, "-o", out / "x"], out / "x" / "merged",
        ),
    }  # fmt: skip


def _stats(top: Path, name: str) -> Path:
    return top / f"{name}.stats.safetensors"


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    found = hashlib.sha256()
    items = sorted(path.rglob("*")) if path.is_dir() else [path]
    for item in items:
        if item.is_file() and item.suffix not in PASSING:
            found.update(f"{item.relative_to(path)}\0".encode())
            found.update(hashlib.sha256(item.read_bytes()).digest())
    return found.hexdigest() if path.exists() else "nothing"


def forked(arguments: list[Any], root: Path, at: int, fault) -> tuple[int, str]:
    """A call in a process of its own: its exit status, and what it says or its count."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        code, text = ending_of(lambda: _called(arguments, root, at, fault))
        try:
            os.write(told, text.encode()[-4000:])
        finally:
            os._exit(code)
    os.close(told)
    with open(heard, encoding="utf-8") as line:  # noqa: PTH123  (a pipe)
        text = line.read()
    _, status = os.waitpid(child, 0)
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), text


def _called(arguments: list[Any], root: Path, at: int, fault) -> str:
    disk.arm(root, at, fault)
    with contextlib.redirect_stdout(io.StringIO()):
        _app.app([str(x) for x in arguments], standalone_mode=False)
    return str(disk.count)


def old_output(name: str, target: Path) -> None:
    """What an earlier call left: a file where the verb writes one, else a folder."""
    kinds = {"stats": statistics.ENTRY, "fisher": fisher.ENTRY}
    if name in kinds:
        save_file({"old": torch.zeros(1)}, target, metadata={kinds[name]: "old"})
    else:
        target.mkdir(parents=True)
        (target / "old.txt").write_text("old", encoding="utf-8")
        seal(target, {"init": START, "train": TRAINING}.get(name, MERGE), {})


def _clear(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def try_verb(name: str, arguments: list[Any], target: Path, points: int) -> dict[str, Any]:
    """All faults of one verb."""
    out = target.parent if target.name != "merged" else target.parent.parent
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code, text = forked(arguments, out, 0, None)
    assert code == 0, (name, text)
    count, new = int(text), digest(target)
    found: dict[str, Any] = {"operations": count, "faults": 0, "old": 0, "new": 0, "failures": []}
    for fault, does in FAULTS.items():
        step = max(1, -(-count // points))
        for at in range(1, count + 1, step):
            _clear(target)
            old_output(name, target)
            old = digest(target)
            code, text = forked(arguments, out, at, does)
            found["faults"] += 1
            now = digest(target)
            if now in (old, new):
                found["old" if now == old else "new"] += 1
            else:
                found["failures"].append(f"{name}, {fault} at {at}: neither old nor new")
            # A folder that is there need not be made: that one refusal changes nothing.
            if code == 1 or (code == 0 and now != new):
                found["failures"].append(f"{name}, {fault} at {at}: status {code}: {text[-800:]}")
    code, text = forked(arguments, out, 0, None)
    left = [p for p in out.rglob(".*.part-*") if p.is_dir()]
    if code or digest(target) != new or left:
        found["failures"].append(f"{name}, the call after: status {code}, left {left}: {text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("top", type=Path)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--only", nargs="*")
    asked = parser.parse_args()
    asked.top.mkdir(parents=True, exist_ok=True)
    base = make_base(asked.top / "base", make_tokenizer(asked.top))
    watch()
    found = {}
    for name, (arguments, target) in verbs(asked.top, base).items():
        if not asked.only or name in asked.only:
            found[name] = try_verb(name, arguments, target, asked.points)
            print(name, found[name], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

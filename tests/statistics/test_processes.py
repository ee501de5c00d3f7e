"""Several real processes give what one gives. Run as a program, this file is one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert

from orthomerge.errors import OrthomergeError
from orthomerge.moments import Representation
from orthomerge.statistics import Statistics, collect_statistics, end_processes

WORLD = 3
CASES = {
    "full": ("token", Representation("full")),
    "rows": ("token", Representation("rows", rows=300)),
    "sampled rows": ("token", Representation("rows", rows=16)),
    "sketch": ("token", Representation("sketch", size=8)),
    "sample": ("sample", Representation("full")),
    "task_mean": ("task_mean", Representation("full")),
    # Fewer batches than processes: the last one has none, and takes part all the same.
    "two batches": ("token", Representation("full")),
    "two batches of rows": ("sample", Representation("rows")),
}
FAILURES = ["not finite", "all padding", "no data", "breaks"]


def batches(count=7):
    generator = torch.Generator().manual_seed(4)
    for number in range(count):
        ids = torch.randint(5, 40, (4, 5 + number), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 2:] = 0
        mask[3, 4:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def collect(case: str) -> Statistics:
    granularity, representation = CASES[case]
    count = 2 if case.startswith("two") else 7
    return collect_statistics(
        tiny_bert().double(), batches(count), ["query", "dense"], granularity=granularity,
        representation=representation,
    )  # fmt: skip


def fail(case: str) -> None:
    """A failure that only process 1 meets, or all."""
    stream = list(batches())
    model = tiny_bert()
    if case == "not finite":
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[3] = float("nan")
        stream[1]["input_ids"][0, 0] = 3
    elif case == "breaks":
        stream[1]["input_ids"][0, 0] = 10**6
    elif case == "all padding":
        for batch in stream:
            batch["attention_mask"][:] = 0
    else:
        stream = []
    collect_statistics(model, stream, ["query"], task=case)


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for case in CASES:
        found = collect(case)
        if rank == 0:
            found.save(folder / f"{case}.stats.safetensors")
    for case in FAILURES:
        try:
            fail(case)
        except Exception as problem:
            kind = "mistake" if isinstance(problem, OrthomergeError) else type(problem).__name__
            (folder / f"{case}-{rank}.txt").write_text(f"{kind}: {problem}")
    end_processes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes left behind: a file a case, and what each said of each failure."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={WORLD}", __file__, str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", [c for c in CASES if c != "sketch"])
def test_processes_together_find_what_one_finds(folder, case):
    found, alone = Statistics.load(folder / f"{case}.stats.safetensors"), collect(case)
    assert found.meta == alone.meta
    assert found.layers == alone.layers
    for layer in alone.layers:
        reference = alone.second_moment(layer)
        error = torch.linalg.matrix_norm(found.second_moment(layer) - reference)
        assert error <= 1e-9 * torch.linalg.matrix_norm(reference), layer
        assert found.moment(layer).count == alone.moment(layer).count
        assert found.moment(layer).exact == alone.moment(layer).exact
        assert found.moment(layer).slack == alone.moment(layer).slack


def test_sketches_of_processes_keep_their_bound(folder):
    found, exact = Statistics.load(folder / "sketch.stats.safetensors"), collect("full")
    for layer in exact.layers:
        reference, sketch = exact.second_moment(layer), found.moment(layer)
        left = torch.linalg.eigvalsh(reference - sketch.matrix)
        room = 1e-9 * sketch.trace
        assert float(left[0]) >= -room
        assert float(left[-1]) <= sketch.slack + room
        tail = torch.linalg.eigvalsh(reference).flip(0)[4:].sum()
        assert sketch.slack <= float(tail) / (8 - 4) + room
        assert sketch.count == exact.moment(layer).count


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not finite", "1 of 18 feature rows hold NaN or infinity"),
        ("all padding", "no feature row was seen"),
        ("no data", "no sample was seen"),
    ],
)
def test_what_one_process_meets_all_say(folder, case, words):
    said = {(folder / f"{case}-{rank}.txt").read_text() for rank in range(WORLD)}
    assert all(s.startswith("mistake: task '") and words in s for s in said)
    assert len({s.replace(f"task '{case}', ", "") for s in said}) == 1


def test_a_process_that_breaks_does_not_leave_the_others_waiting(folder):
    said = [(folder / f"breaks-{rank}.txt").read_text() for rank in range(WORLD)]
    assert said[1].startswith("IndexError")
    assert said[0] == said[2]
    assert said[0].startswith("RuntimeError: process 1 failed: IndexError")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A run killed at any moment, or out of disk, goes on where it was and ends with the same rows."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_recipe import check_journal, execute, journal, make_recipe, untimed

from orthomerge.errors import OrthomergeError
from orthomerge.io import files
from orthomerge.io.disk import sweep
from orthomerge.io.files import disk_error
from orthomerge.io.rows import read_rows

KILLS = 20
# Seconds of work between two kills, drawn uniformly; a run of this recipe takes a few seconds. One
# that is finished before its kill is left, and the kill goes to a new one.
LONGEST = 1.5

_PROGRAM = """
import json, os, signal, sys, time
top, values, kills = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
from pathlib import Path
import torch, transformers, peft
torch.set_num_threads(1)
from orthomerge.experiment import Run, parse_recipe
from orthomerge.experiment.progress import Reporter

class Says(Reporter):
    def stage(self, description, worker=0):
        os.write(told, b".")

def stands(folder):
    rows = folder / "results.jsonl"
    text = rows.read_text() if rows.exists() else ""
    chunks = sorted(
        [str(p), p.stat().st_ino, p.stat().st_mtime_ns]
        for kind in ("stats", "starts", "adapters", "fisher")
        for p in (folder / kind).rglob("*")
        if p.is_file() and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    )
    return {"rows": text[: text.rfind("\\n") + 1], "chunks": chunks}

runs, killed = [[]], 0
while True:
    folder = Path(top, str(len(runs) - 1))
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        Run(parse_recipe(values), folder, reporter=Says()).execute()
        os._exit(0)
    os.close(told)
    if killed < len(kills):
        os.read(heard, 1)  # work has begun, or the run has ended
        time.sleep(kills[killed])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(heard)
    runs[-1].append(stands(folder))
    if os.WIFSIGNALED(status):
        killed += 1
        continue
    assert status == 0, status
    if killed == len(kills):
        break
    runs.append([])
print(json.dumps({"killed": killed, "runs": runs}))
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_row_and_repeat_no_finished_job(
    tiny_base, tmp_path
):
    recipe = make_recipe(tmp_path / "tasks", tiny_base)
    draw = random.Random(20)
    kills = [draw.uniform(0, LONGEST) for _ in range(KILLS)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path), json.dumps(recipe), json.dumps(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == KILLS
    executed = execute(recipe, tmp_path / "alone")
    for number, moments in enumerate(found["runs"]):
        output = tmp_path / str(number)
        assert untimed(output / "results.jsonl") == untimed(executed)
        check_journal(output)
        # What stood after a kill is there to the byte at the end, times of rows included: it was
        # not made again.
        last = moments[-1]
        at_end = {path: (inode, modified) for path, inode, modified in last["chunks"]}
        for moment in moments[:-1]:
            assert set(moment["rows"].splitlines()) <= set(last["rows"].splitlines())
            for path, inode, modified in moment["chunks"]:
                assert at_end[path] == (inode, modified), path
        assert not [p for p in output.rglob(".*") if ".part-" in p.name]


@pytest.mark.slow
def test_a_run_killed_with_its_workers_leaves_none_behind_and_goes_on(tiny_base, tmp_path):
    recipe = make_recipe(tmp_path / "tasks", tiny_base)
    program = (
        "import sys, json\n"
        "from orthomerge.experiment import Run, parse_recipe\n"
        "from orthomerge.experiment.executors import ProcessExecutor\n"
        "if __name__ == '__main__':\n"
        "    recipe = parse_recipe(json.loads(sys.argv[1]))\n"
        "    Run(recipe, sys.argv[2], executor=ProcessExecutor(2)).execute()\n"
    )
    script, output = tmp_path / "driver.py", tmp_path / "run"
    script.write_text(program)
    driver = subprocess.Popen([sys.executable, str(script), json.dumps(recipe), str(output)])
    while not (output / "results.jsonl").exists() and driver.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    before = read_rows(output / "results.jsonl")
    rows = execute(recipe, output)
    assert {r.to_json() for r in before} <= {r.to_json() for r in rows}
    assert untimed(rows) == untimed(execute(recipe, tmp_path / "alone"))
    check_journal(output)


def test_leftovers_of_a_killed_writer_are_swept(tmp_path):
    (tmp_path / "a" / ".x.part-1234").mkdir(parents=True)
    (tmp_path / "a" / ".y.part-1234").mkdir()
    (tmp_path / "a" / ".y.part-1234" / ".writer").touch()
    (tmp_path / "a" / ".y.part-1234" / "y").touch()
    (tmp_path / "a" / "kept").mkdir()
    sweep(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_disk_that_fills_up_is_one_sentence_and_finished_work_is_kept(
    tiny_base, tmp_path, monkeypatch
):
    """The journal is refused at its fifth finished job, as a full disk would refuse it."""
    recipe = make_recipe(tmp_path / "tasks", tiny_base)
    output, append = tmp_path / "run", files._append

    def full(path: Path, text: str) -> None:
        if path.name == "jobs.jsonl" and len(journal_or_none(output)) >= 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(files, "_append", full)
        with pytest.raises(OrthomergeError, match="no space left on the disk") as caught:
            execute(recipe, output)
    assert "\n" not in str(caught.value)
    before = check_journal(output)
    assert len(before) >= 3
    rows = execute(recipe, output)
    assert check_journal(output)[: len(before)] == before
    assert untimed(rows) == untimed(output / "results.jsonl")


def journal_or_none(output):
    return journal(output) if (output / "jobs.jsonl").exists() else []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_really_full_disk_is_one_sentence_and_the_run_goes_on_with_more_room(tiny_base, tmp_path):
    recipe = {**make_recipe(tmp_path / "tasks", tiny_base), "save_merged": True}
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip("this process may not mount")
    try:
        with pytest.raises(OrthomergeError, match="no space left on the disk") as caught:
            execute(recipe, disk / "run")
        assert "\n" not in str(caught.value)
        before = check_journal(disk / "run")
        assert before
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        rows = execute(recipe, disk / "run")
        assert check_journal(disk / "run")[: len(before)] == before
        assert untimed(rows) == untimed(execute(recipe, tmp_path / "alone"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left"),
        (OSError(errno.EDQUOT, "x"), "no space left"),
        (OSError(errno.EFBIG, "x"), "ulimit -f"),
        (OSError(errno.EIO, "x"), "failed"),
        (OSError(errno.EROFS, "x"), "Read-only"),
        (RuntimeError("IoError: No space left on device (os error 28)"), "no space left"),
        (OSError(errno.EACCES, "x"), None),
        (ValueError("os error 28"), None),
    ],
)
def test_what_a_disk_says_in_one_sentence(problem, word):
    said = disk_error(problem, "there")
    assert (said is None) == (word is None)
    if word:
        assert word in str(said) and "'there'" in str(said) and "\n" not in str(said)

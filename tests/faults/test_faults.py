"""A few seeded faults of every kind; `make faults` does two hundred and writes docs/faults.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def program(name: str, folder: Path, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), str(folder), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_run(found: dict, count: int) -> None:
    assert not found["failures"], "\n".join(found["failures"])
    assert found["injected"] + len(found["skipped"]) >= count
    assert found["runs finished"] >= 1


def check_verbs(found: dict) -> None:
    for name, verb in found.items():
        assert not verb["failures"], "\n".join(verb["failures"])
        assert verb["old"] + verb["new"] == verb["faults"] > 0, name


def test_a_run_loses_no_finished_job_and_tells_nothing_wrong(tmp_path):
    check_run(program("campaign", tmp_path, "--faults", 8, "--seed", 5), 8)


def test_an_output_is_all_of_the_old_or_all_of_the_new(tmp_path):
    check_verbs(program("verbs", tmp_path, "--points", 3, "--only", "stats", "merge"))


@pytest.mark.slow
def test_every_kind_of_fault_and_every_verb(tmp_path):
    check_run(program("campaign", tmp_path / "run", "--faults", 28, "--seed", 6), 20)
    check_verbs(program("verbs", tmp_path / "verbs", "--points", 4))

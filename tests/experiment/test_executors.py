"""Wherever jobs are done, and whoever dies under them, the rows are those of one process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import torch
from tiny_recipe import check_journal, execute, journal, make_recipe, untimed

from orthomerge.errors import MergeError, OrthomergeError, UnknownNameError
from orthomerge.experiment.executors import (
    ProcessExecutor,
    RayExecutor,
    SerialExecutor,
    choose_executor,
)
from orthomerge.experiment.progress import Reporter
from orthomerge.io.rows import read_rows

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are in one order everywhere, so that rows can be compared to the last bit."""
    before, said = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)
    os.environ.pop("OMP_NUM_THREADS")
    if said is not None:
        os.environ["OMP_NUM_THREADS"] = said


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("tasks"), tiny_base)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The rows of a run in this process."""
    output = tmp_path_factory.mktemp("alone")
    rows = execute(recipe, output)
    assert len(check_journal(output)) == len(set(check_journal(output)))
    return rows


class Watching(Reporter):
    """Counts, and kills the worker process that first says it trains, as often as asked."""

    def __init__(self, kills: int = 0) -> None:
        self.kills, self.killed = kills, []
        self.rows = self.units = self.size = 0
        self.last = (0, 0)
        self.workers = set()

    def total(self, units):
        self.size = units

    def advance(self, units):
        self.units += units

    def row(self, row):
        self.rows += 1

    def jobs(self, done, of):
        self.last = (done, of)

    def step(self, done, of, worker=0):
        if len(self.killed) < self.kills:
            pid = self.pids[worker]
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def stage(self, description, worker=0):
        self.workers.add(worker)

    @property
    def pids(self):
        found = {}
        for line in journal(self.output):
            if line["event"] == "began":
                worker, process = line["worker"].split(", ")
                found[int(worker.split()[1])] = int(process.split()[1])
        return found


def test_side_by_side_and_with_a_killed_worker_the_rows_are_the_same(recipe, alone, tmp_path):
    reporter = Watching(kills=1)
    reporter.output = tmp_path
    rows = execute(recipe, tmp_path, executor=ProcessExecutor(2), reporter=reporter)
    assert untimed(rows) == untimed(alone) == untimed(tmp_path / "results.jsonl")
    assert reporter.rows == len(rows)
    assert reporter.units == reporter.size
    assert reporter.last[0] == reporter.last[1] == len(check_journal(tmp_path))
    assert reporter.workers == {0, 1}
    lost = [line for line in journal(tmp_path) if line["event"] == "lost"]
    assert [line["reason"] for line in lost] == ["its process ended with signal 9"]
    assert len(reporter.killed) == 1 and lost[0]["job"] in check_journal(tmp_path)
    assert not [p for p in psutil.Process().children() if p.pid in reporter.pids.values()]


@pytest.mark.slow
def test_a_worker_that_keeps_dying_ends_the_run_in_a_sentence_and_all_else_is_kept(
    recipe, alone, tmp_path
):
    reporter = Watching(kills=2)
    reporter.output = tmp_path
    with pytest.raises(OrthomergeError, match=r"given up after 2 attempts .*signal 9") as caught:
        execute(recipe, tmp_path, executor=ProcessExecutor(1), reporter=reporter, retries=1)
    assert "\n" not in str(caught.value)
    before = check_journal(tmp_path)
    assert before
    assert untimed(execute(recipe, tmp_path)) == untimed(alone)
    assert check_journal(tmp_path)[: len(before)] == before


def test_a_job_larger_than_the_budget_is_refused_by_name(recipe, tmp_path):
    with pytest.raises(OrthomergeError, match=r"'stats' is estimated to need 191 MiB.*--memory"):
        execute(
            {**recipe, "arms": {"osrm": {"start": "min_eigen"}}},
            tmp_path,
            executor=ProcessExecutor(2, memory=150_000_000),
        )
    assert not list(tmp_path.glob("stats/*"))


@pytest.mark.slow
def test_jobs_side_by_side_keep_within_the_budget(recipe, alone, tmp_path):
    """Two of 200 MB do not fit into 350, one of 200 and one of 100 do."""
    rows = execute(recipe, tmp_path, executor=ProcessExecutor(3, memory=350_000_000))
    assert untimed(rows) == untimed(alone)
    memory = {"stats": 200, "train": 200, "eval": 200, "merge": 200, "start": 100, "fisher": 100}
    at_work, most = {}, 0
    for line in journal(tmp_path):
        if line["event"] == "began":
            at_work[line["job"]] = memory[line["kind"]]
        else:
            del at_work[line["job"]]
        most = max(most, sum(at_work.values()))
    assert 200 < most <= 350


@pytest.mark.slow
def test_a_mistake_in_a_worker_is_the_same_sentence(recipe, tmp_path):
    merges = [{"method": "ties", "options": {"density": 7.0}}]
    said = []
    for place, executor in (("serial", SerialExecutor()), ("process", ProcessExecutor(2))):
        with pytest.raises(OrthomergeError) as caught:
            execute({**recipe, "merges": merges}, tmp_path / place, executor=executor)
        said.append(str(caught.value))
        assert len(read_rows(tmp_path / place / "results.jsonl")) >= 2
    assert said[0] == said[1]
    assert isinstance(caught.value, OrthomergeError | MergeError)


def ray_workers():
    """The processes of the Ray cluster below this process that are at a job now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and "IDLE" not in title:
            found.append(process)
    return found


@needs_ray
@pytest.mark.slow
def test_on_a_ray_cluster_with_a_killed_worker_the_rows_are_the_same(recipe, alone, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    reporter, killed = Watching(), []

    def kill_one():
        while not killed:
            for process in ray_workers():
                if any("adapters/" in part for part in process.cmdline()) or reporter.rows:
                    process.kill()
                    killed.append(process.pid)
                    break
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one, daemon=True)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        killer.start()
        rows = execute(recipe, tmp_path, executor=RayExecutor("auto"), reporter=reporter)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert untimed(rows) == untimed(alone) == untimed(tmp_path / "results.jsonl")
    assert killed
    lost = [line for line in journal(tmp_path) if line["event"] == "lost"]
    assert len(lost) == 1 and "Ray worker was lost" in lost[0]["reason"]
    assert reporter.units == reporter.size
    assert reporter.last[0] == reporter.last[1] == len(check_journal(tmp_path))


@needs_ray
@pytest.mark.slow
def test_what_no_machine_of_the_cluster_has_is_said(recipe, tmp_path):
    values = {**recipe, "resources": {"start": {"gpus": 512, "memory": "1MB"}}}
    with pytest.raises(OrthomergeError, match=r"no machine .*kind 'start'.*512 GPUs"):
        execute(values, tmp_path, executor=RayExecutor())


@needs_ray
def test_no_cluster_is_said():
    executor = RayExecutor("127.0.0.1:1")
    with pytest.raises(OrthomergeError, match=r"no Ray cluster at '127.0.0.1:1'"):
        executor._connect()


def test_an_executor_that_cannot_be_is_a_sentence(monkeypatch):
    with pytest.raises(UnknownNameError, match="did you mean 'ray'"):
        choose_executor("rya")
    for name in ("ray", "serial"):
        with pytest.raises(OrthomergeError, match="--executor process"):
            choose_executor(name, jobs=2)
    with pytest.raises(OrthomergeError, match="--executor ray"):
        choose_executor(address="auto")
    for told, kind in (({}, SerialExecutor), ({"jobs": 2}, ProcessExecutor)):
        assert isinstance(choose_executor(**told), kind)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OrthomergeError, match=r"pip install 'orthomerge\[ray\]'"):
        choose_executor("ray")

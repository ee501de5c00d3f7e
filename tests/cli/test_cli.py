"""The commands as a user types them: a table of arguments, output and exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import call, make_texts, write_task
from typer.testing import CliRunner

from orthomerge.adapters import (
    read_adapter,
    read_excluded,
    read_penalty,
)
from orthomerge.cli import app
from orthomerge.errors import OrthomergeError, RecipeError
from orthomerge.statistics import Statistics


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Statistics, a start and two trained adapters, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        texts = folder / f"{name}.jsonl"
        texts.write_text("\n".join(json.dumps({"text": t}) for t in make_texts(8, seed)))
        call(
            "stats", tiny_base, "--data", texts, "--samples", 6, "--granularity", "sample",
            "--output", folder / f"{name}.stats.safetensors",
        )  # fmt: skip
    for name, others in (("a", "bc"), ("b", "ac")):
        named = [x for o in others for x in ("--others", folder / f"{o}.stats.safetensors")]
        call(
            "init", tiny_base, *named, "--own", folder / f"{name}.stats.safetensors",
            "--paper", "--rank", 4, "--alpha", 8, "--output", folder / f"start-{name}",
        )  # fmt: skip
        write_task(folder / f"task-{name}.csv.jsonl", seed=ord(name))
        call(
            "train", folder / f"start-{name}", "--task", folder / f"task-{name}.csv.jsonl",
            "--constraint", "freeze", "--rows", 24, "--epochs", 1, "--output", folder / name,
        )  # fmt: skip
    return folder


def test_the_steps_meet_in_files(files):
    stats = Statistics.load(files / "a.stats.safetensors")
    assert stats.meta.samples == 6
    assert stats.meta.granularity == "sample"
    out = call("merge", files / "a", files / "b", "--method", "ties", "--option", "density=0.5",
               "--weights", "1,0.5", "--rank", 6, "--output", files / "m", "--json")  # fmt: skip
    assert json.loads(out)["rank"] == 6
    record = json.loads((files / "m" / "merge.json").read_text())
    assert [a["weight"] for a in record["adapters"]] == [1.0, 0.5]
    assert record["options"] == {"density": 0.5}
    task = files / "task-a.csv.jsonl"
    scores = [
        json.loads(call("eval", adapter, "--task", task, "--head", files / "a", "--rows", 20,
                        "--json"))["metrics"]["accuracy"]
        for adapter in (files / "a", files / "m")
    ]  # fmt: skip
    assert all(0 <= s <= 1 for s in scores)
    found = json.loads(
        call("diagnose", files / "a", files / "b", "--stats", files / "a.stats.safetensors",
             "--stats", files / "b.stats.safetensors", "--json")
    )  # fmt: skip
    matrix = found["interference"]
    assert matrix[0][0] == pytest.approx(1)
    # A starts orthogonal to the other task's sampled inputs and is held there.
    assert max(matrix[0][1], matrix[1][0]) < 1e-3


def test_methods_and_tasks_say_where_they_come_from():
    methods = json.loads(call("list", "methods", "--json"))
    assert {"linear", "ties", "dare_ties", "svd"} <= {m["name"] for m in methods}
    assert "task_arithmetic" in next(m for m in methods if m["name"] == "linear")["aliases"]
    assert all(m["paper"] and m["summary"] for m in methods)
    tasks = json.loads(call("list", "tasks", "--json"))
    assert len([t for t in tasks if "/" not in t["name"]]) == 8
    assert all(t["licence"] and t["made"] for t in tasks if "/" not in t["name"])
    assert "ties" in call("list", "methods")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], ["no recipe 'nowhere.yaml'", "demo.yaml"]),
        (["merge", "{f}/a", "{f}/b", "--method", "tis", "--output", "{f}/x"], ["'ties'"]),
        (["merge", "{f}/a", "{f}/b", "--option", "density", "--output", "{f}/x"], ["key=value"]),
        (
            ["merge", "{f}/a", "{f}/b", "--method", "ties", "--option", "densty=1",
             "--output", "{f}/x"],
            ["densty", "did you mean 'density'"],
        ),
        (["merge", "{f}/a", "{f}/b", "--weights", "1,x", "--output", "{f}/x"], ["'1,x'"]),
        (["merge", "{f}/a", "{f}/b", "--weights", "1,2,3", "--output", "{f}/x"], ["3", "2"]),
        (["merge", "{f}/a", "{f}/none", "--output", "{f}/x"], ["no adapter at"]),
        (
            ["stats", "{m}", "--data", "{f}/a.jsonl", "--targets", "q_proj", "--output", "{f}/x"],
            ["q_proj", "linear layers are"],
        ),
        (
            ["stats", "{m}", "--data", "{f}/a.jsonl", "--text-column", "txt", "--output", "{f}/x"],
            ["'txt'", "did you mean 'text'"],
        ),
        (
            ["init", "{m}", "--others", "{f}/b.stats.safetensors", "--rank", "33", "--paper",
             "--output", "{f}/x"],
            ["rank 33", "32 inputs"],
        ),
        (
            ["init", "{m}", "--others", "{f}/b.stats.safetensors", "--rank", "30", "--solver",
             "null_space", "--output", "{f}/x"],
            ["larger than the admissible subspace", "26 of 32"],
        ),
        (
            ["init", "{m}", "--others", "{f}/b.stats.safetensors", "--solver", "min_eign",
             "--output", "{f}/x"],
            ["did you mean 'min_eigen'"],
        ),
        (
            ["train", "{f}/start-a", "--task", "sentimnt", "--output", "{f}/x"],
            ["did you mean 'sentiment'"],
        ),
        (
            ["diagnose", "{f}/a", "{f}/b", "--stats", "{f}/a.stats.safetensors"],
            ["2 adapters and 1 statistics"],
        ),
        (["report", "{f}"], ["no result rows"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_writes_nothing(files, tiny_base, arguments, words):
    filled = [a.format(f=files, m=tiny_base) for a in arguments]
    with pytest.raises(OrthomergeError) as caught:
        call(*filled)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (files / "x").exists()


def test_the_users_mistake_ends_with_status_2_and_no_traceback():
    command = [sys.executable, "-m", "orthomerge", "run", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: no recipe 'nowhere.yaml'")


def test_importing_the_package_does_not_load_torch():
    code = "import sys, orthomerge; assert 'torch' not in sys.modules; orthomerge.interference"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    import orthomerge

    for name in orthomerge.__all__:
        assert getattr(orthomerge, name) is not None
    with pytest.raises(AttributeError):
        orthomerge.nothing  # noqa: B018


def test_a_projected_start_is_kept_to_and_the_usual_one_has_a_penalty(files, tmp_path):
    named = ["--others", files / "b.stats.safetensors", "--others", files / "c.stats.safetensors"]
    mine = ["--own", files / "a.stats.safetensors", "--rank", 4]
    said = call("init", _base(files), *named, *mine, "--output", tmp_path / "usual")
    assert "constraint 'penalty'" in said
    said = call("init", _base(files), *named, *mine, "--constraint", "project",
                "--output", tmp_path / "s")  # fmt: skip
    assert "start 'contrastive'" in said
    assert "OsrmCallback.from_start" in said
    out = call("train", tmp_path / "s", "--task", files / "task-a.csv.jsonl", "--rows", 24,
               "--epochs", 1, "--output", tmp_path / "t", "--json")  # fmt: skip
    assert json.loads(out)["constraint"] == "project"
    directions, trained = read_excluded(tmp_path / "s"), read_adapter(tmp_path / "t")
    for layer, factors in trained.layers.items():
        rows = next(r for n, r in directions.rows.items() if layer.endswith(n))
        assert float((factors.A.double() @ rows.T).norm()) <= 1e-6
    said = call("init", _base(files), *named, *mine, "--paper", "--output", tmp_path / "paper")
    assert "start 'min_eigen'" in said
    assert not (tmp_path / "paper" / "kept_out.safetensors").exists()


def test_the_penalty_goes_from_a_start_to_a_training_and_is_said_beside_the_adapter(
    files, tmp_path
):
    named = ["--others", files / "b.stats.safetensors", "--others", files / "c.stats.safetensors"]
    said = call("init", _base(files), *named, "--constraint", "penalty", "--strength", 3,
                "--rank", 4, "--output", tmp_path / "s")  # fmt: skip
    assert "PEFT's own start" in said
    assert "constraint 'penalty'" in said
    assert read_penalty(tmp_path / "s").strength == 3
    config = json.loads((tmp_path / "s" / "start.json").read_text())["config"]
    assert (config["solver"], config["constraint"], config["strength"]) == ("default", "penalty", 3)
    call("verify", tmp_path / "s")

    def train(name, *more):
        out = call("train", tmp_path / "s", "--task", files / "task-a.csv.jsonl", "--rows", 24,
                   "--epochs", 8, "--output", tmp_path / name, "--json", *more)  # fmt: skip
        assert json.loads(out)["constraint"] == "penalty"
        return json.loads((tmp_path / name / "training.json").read_text())

    told = train("t")
    assert (told["constraint"], told["strength"]) == ("penalty", 3)
    assert all(step > 0 and value >= 0 for step, value in told["penalties"])
    held = json.loads((files / "a" / "training.json").read_text())
    assert held["constraint"] == "freeze" and "strength" not in held
    assert not (tmp_path / "t" / "penalty.safetensors").exists()  # others' statistics stay here
    assert train("still", "--base-dropout", 0)["losses"] != told["losses"]
    stronger = train("stronger", "--strength", 1000)
    assert stronger["strength"] == 1000
    assert stronger["penalties"][-1][1] < told["penalties"][-1][1]
    result = CliRunner().invoke(app, [
        "train", str(files / "start-a"), "--task", str(files / "task-a.csv.jsonl"), "--strength",
        "1", "--output", str(tmp_path / "no"),
    ])  # fmt: skip
    assert isinstance(result.exception, RecipeError)
    assert not (tmp_path / "no").exists()


def test_a_tenth_task_keeps_clear_of_adapters_that_exist(files, tmp_path):
    arguments = ["--others", files / "b.stats.safetensors", "--own", files / "a.stats.safetensors",
                 "--rank", 4, "--constraint", "init"]  # fmt: skip
    before = (files / "b" / "adapter_model.safetensors").read_bytes()
    taken = read_adapter(files / "b").layers

    def overlap(folder) -> float:
        found = read_adapter(folder).layers
        return sum(float((f.A @ taken[n].A.T).square().sum()) for n, f in found.items())

    call("init", _base(files), *arguments, "--solver", "contrastive", "--output", tmp_path / "c")
    call("init", _base(files), *arguments, "--solver", "joint", "--existing", files / "b",
         "--option", "overlap=100", "--output", tmp_path / "j")  # fmt: skip
    assert overlap(tmp_path / "j") < 0.1 * overlap(tmp_path / "c")
    assert (files / "b" / "adapter_model.safetensors").read_bytes() == before


def test_ranks_follow_the_room_and_the_command_says_so(files, tmp_path):
    out = call("init", _base(files), "--others", files / "b.stats.safetensors", "--rank", 30,
               "--quiet-energy", 0.001, "--output", tmp_path / "r")  # fmt: skip
    assert "have fewer than 30 low-energy directions" in out
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert {s["name"] for s in json.loads(call("list", "solvers", "--json"))} >= {
        "min_eigen",
        "joint",
    }


def _base(files):
    return json.loads((files / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_start_says_when_nothing_tells_the_tasks_apart(files, tmp_path):
    own = files / "a.stats.safetensors"
    for others, alike in ((own, True), (files / "b.stats.safetensors", False)):
        said = call("init", _base(files), "--others", others, "--own", own, "--rank", 4,
                    "--solver", "contrastive", "--output", tmp_path / "s")  # fmt: skip
        assert ("no directions tell these tasks apart" in said) == alike

"""`orthomerge stats` and its verbs: collect by default, inspect, merge, publish."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, make_texts
from safetensors.torch import load_file
from typer.testing import CliRunner

from orthomerge.cli import app
from orthomerge.errors import OrthomergeError, RecipeError
from orthomerge.io.units import human_size, parse_size
from orthomerge.moments import RowMoment
from orthomerge.statistics import Statistics


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two parts of one task's data and another task, collected by the command."""
    folder = tmp_path_factory.mktemp("stats")
    texts = make_texts(30, 1)
    for name, part in (("a", texts[:18]), ("b", texts[18:]), ("both", texts)):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps({"text": t}) for t in part))
        call("stats", tiny_base, "--data", data, "--targets", "query,key,value,dense",
             "--output", folder / f"{name}.st")  # fmt: skip
    return folder


def test_the_group_collects_by_default_and_by_name(files, tiny_base):
    for words in (
        ["stats", tiny_base, "--data"],
        ["stats", "--data"],
        ["stats", "collect", "--data"],
    ):
        rest = [] if words[1] == tiny_base else [tiny_base]
        call(*words, files / "a.jsonl", *rest, "--targets", "query,key,value,dense",
             "--output", files / "again.st")  # fmt: skip
        assert (files / "again.st").read_bytes() == (files / "a.st").read_bytes()


def test_help_lists_every_verb_with_an_example():
    text = call("stats", "--help")
    for verb in ("collect", "inspect", "merge", "publish"):
        assert re.search(rf"^│ {verb} ", text, re.MULTILINE)
    for option in ("--data", "--representation", "--budget", "--directions", "--device-map"):
        assert option in text
    assert "orthomerge stats minilm --data texts.jsonl" in text
    for verb in ("collect", "inspect", "merge", "publish"):
        assert "Example: orthomerge stats" in call("stats", verb, "--help")
    order = re.findall(r"^│ (\w+) ", call("--help"), re.MULTILINE)
    assert order.index("stats") < order.index("init") < order.index("report")


def test_a_mistyped_verb_is_not_taken_for_a_model(files):
    result = CliRunner().invoke(app, ["stats", "inspct", str(files / "a.st")])
    assert result.exit_code == 2
    assert "inspect" in result.output


def test_merging_files_is_collecting_over_both(files):
    call("stats", "merge", files / "a.st", files / "b.st", "--output", files / "ab.st")
    merged, whole = Statistics.load(files / "ab.st"), Statistics.load(files / "both.st")
    assert merged.meta == whole.meta
    for layer in whole.layers:
        torch.testing.assert_close(  # float32 activations of other batches
            merged.second_moment(layer), whole.second_moment(layer), rtol=1e-4, atol=1e-5
        )
        assert merged.moment(layer).count == whole.moment(layer).count


def test_inspect_says_what_is_in_a_file_and_what_it_gives_away(files):
    text = call("stats", "inspect", files / "a.st")
    for words in ("weights", "tokenizer", "dense, key, query, value", "token", "18", "everything",
                  "effective rank", "least/mean", "This is not differential privacy"):  # fmt: skip
        assert words in text
    # The blocks' inputs are alike: a line for both of the two blocks, and they are counted.
    (line,) = [x for x in text.splitlines() if "attention.self" in x]
    assert line.split() == ["1", "encoder.layer.*.attention.self.{query,key,value}"]
    first = next(x for x in text.splitlines() if x.split()[:1] == ["1"] and "full" in x)
    assert first.split()[1:3] == ["2", "32"]
    found = json.loads(call("stats", "inspect", files / "a.st", "--json"))
    statistics = Statistics.load(files / "a.st")
    assert found["bytes"] == (files / "a.st").stat().st_size
    assert len(found["inputs"]) == len(statistics.moments) == 9
    tensors = load_file(files / "a.st")
    for entry in found["inputs"]:
        moment = statistics.moment(entry["lead"])
        values = torch.linalg.eigvalsh(moment.matrix).flip(0).clamp_min(0)
        shares = values / values.sum()
        entropy = float(-(shares * shares.clamp_min(1e-300).log()).sum())
        shape = entry["spectrum"]
        assert shape["trace"] == pytest.approx(moment.trace)
        assert shape["top_share"] == pytest.approx(float(shares[0]))
        assert shape["effective_rank"] == pytest.approx(
            torch.tensor(entropy).exp().item(), rel=1e-5
        )
        assert float(shares[: shape["directions_90"]].sum()) >= 0.9
        assert float(shares[: shape["directions_90"] - 1].sum()) < 0.9
        assert float(shares[: shape["directions_99"]].sum()) >= 0.99
        mine = [t for n, t in tensors.items() if n.startswith(entry["lead"] + ":")]
        assert entry["bytes"] == sum(t.numel() * t.element_size() for t in mine)
    query = next(e for e in found["inputs"] if e["lead"].endswith("0.attention.self.query"))
    assert len(query["layers"]) == 3
    pooled = next(e for e in found["inputs"] if e["lead"] == "pooler.dense")
    assert pooled["rows"] == 18 < pooled["width"]
    assert any("span of the rows is exactly determined" in s for s in found["gives_away"])


@pytest.mark.parametrize(
    ("granularity", "words"),
    [
        ("token", "Every one of"),
        ("sample", "Every text is one row"),
        ("task_mean", "given exactly"),
    ],
)
def test_what_is_given_away_depends_on_the_granularity(files, tiny_base, granularity, words):
    call("stats", tiny_base, "--data", files / "a.jsonl", "--granularity", granularity,
         "--output", files / "g.st")  # fmt: skip
    told = json.loads(call("stats", "inspect", files / "g.st", "--json"))["gives_away"]
    assert any(words in s for s in told)


@pytest.mark.parametrize(
    ("arguments", "kinds", "words"),
    [
        (["--representation", "full"], {"full"}, "full: 7 inputs of width 32"),
        (["--representation", "rows", "--rows", "5"], {"rows"}, "rows (5 kept, drawn from"),
        (["--representation", "rows"], {"rows"}, "rows (180 kept)"),
        (["--representation", "sketch", "--size", "6"], {"sketch"}, "sketch (6 directions)"),
        (["--budget", "1KiB"], {"sketch"}, "sketch"),
        ([], {"full", "rows"}, "encoder.layer.*.attention.self.{query,key,value}"),
    ],
)
def test_the_representation_is_chosen_and_reported(files, tiny_base, arguments, kinds, words):
    command = ["stats", tiny_base, "--data", files / "a.jsonl", "--targets",
               "query,key,value,dense", "--output", files / "r.st", *arguments]  # fmt: skip
    assert words in call(*command)
    found = json.loads(call(*command, "--json"))["representations"]
    assert {item["kind"] for item in found.values()} == kinds
    assert {m.kind for m in Statistics.load(files / "r.st").moments.values()} == kinds


def test_a_part_is_published_at_once_or_from_a_file(files, tiny_base, tmp_path):
    published = ["--directions", 4, "--noise", 0.2, "--noise-seed", 3]
    text = call("stats", tiny_base, "--data", files / "a.jsonl", "--targets",
                "query,key,value,dense", *published, "--output", tmp_path / "once.st")  # fmt: skip
    assert "not differential privacy" in text
    call("stats", "publish", files / "a.st", *published, "--output", tmp_path / "later.st")
    once, later = Statistics.load(tmp_path / "once.st"), Statistics.load(tmp_path / "later.st")
    assert once.meta == later.meta
    assert (once.meta.directions, once.meta.noise) == (4, 0.2)
    assert all(isinstance(m, RowMoment) and len(m.factor) == 4 for m in later.moments.values())
    told = json.loads(call("stats", "inspect", tmp_path / "later.st", "--json"))["gives_away"]
    assert any("Only the top 4 directions" in s and "0.2" in s for s in told)
    for solver in ("min_eigen", "null_space", "contrastive"):
        call("init", tiny_base, "--others", tmp_path / "later.st", "--others",
             tmp_path / "once.st", "--own", files / "b.st", "--solver", solver, "--rank", 4,
             "--output", tmp_path / solver)  # fmt: skip
        assert (tmp_path / solver / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{f}/none.st"], ["no statistics file", "orthomerge stats"]),
        (["inspect", "{f}/a.jsonl"], ["cannot be read as statistics"]),
        (["merge", "{f}/a.st", "{f}/part.st", "--output", "{f}/x"], ["published part"]),
        (["merge", "{f}/a.st", "{f}/q.st", "--output", "{f}/x"], ["q.st", "target modules"]),
        (["publish", "{f}/part.st", "--directions", "2", "--output", "{f}/x"], ["already"]),
        (["publish", "{f}/a.st", "--directions", "0", "--output", "{f}/x"], ["from 1 to"]),
        (["publish", "{f}/a.st", "--directions", "49", "--output", "{f}/x"], ["from 1 to"]),
        (["publish", "{f}/a.st", "--directions", "3", "--noise", "-1", "--output", "{f}/x"],
         ["not negative"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--noise", "0.1"], ["--directions"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--budget", "lots"], ["2GiB"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--representation", "ful"],
         ["did you mean 'full'"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--granularity", "tokens"],
         ["did you mean 'token'"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--device-map", "{{"], ["not JSON"]),
        (["{m}", "--data", "{f}/a.jsonl", "--output", "{f}/x", "--device-map", "nowhere"],
         ["cannot be loaded"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_writes_nothing(files, tiny_base, arguments, words):
    if not (files / "part.st").exists():
        call("stats", "publish", files / "a.st", "--directions", 4, "--output", files / "part.st")
        call("stats", tiny_base, "--data", files / "a.jsonl", "--output", files / "q.st")
    with pytest.raises(OrthomergeError) as caught:
        call("stats", *[a.format(f=files, m=tiny_base) for a in arguments])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (files / "x").exists()
    assert not list(files.glob(".x*"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9), ("1e6B", 10**6)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 furlong", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="512MiB"):
        parse_size(text)


def test_sizes_are_written():
    assert [human_size(n) for n in (5, 2048, 1536 * 1024, 2**40)] == [
        "5 B", "2 KiB", "1.5 MiB", "1 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize("device_map", ["auto", "cpu", '{"": "cpu"}'])
def test_a_device_map_changes_where_it_runs_not_what_is_found(files, tiny_base, device_map):
    call("stats", tiny_base, "--data", files / "a.jsonl", "--targets", "query,key,value,dense",
         "--device-map", device_map, "--output", files / "d.st")  # fmt: skip
    assert (files / "d.st").read_bytes() == (files / "a.st").read_bytes()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launch(launcher, *arguments, **env):
    # Port 0, which would be any that is free, is taken for itself by Accelerate 1.4 with Torch 2.4.
    port = ["--main_process_port", free_port()] if launcher is ACCELERATE else []
    return subprocess.run(
        [sys.executable, "-m", *launcher, *port, "-m", "orthomerge", "stats", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_write_one_file_equal_to_that_of_one(files, tiny_base, tmp_path):
    arguments = [tiny_base, "--data", files / "both.jsonl", "--targets", "query,key,value,dense",
                 "--batch-size", 4]  # fmt: skip
    done = launch(ACCELERATE, *arguments, "--output", tmp_path / "two.st", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["samples"] == 30  # printed once
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: more round the model's float32 differently
    try:
        call("stats", *arguments, "--output", tmp_path / "one.st")
    finally:
        torch.set_num_threads(threads)
    two, one = Statistics.load(tmp_path / "two.st"), Statistics.load(tmp_path / "one.st")
    assert two.meta == one.meta
    for layer in one.layers:
        reference = one.second_moment(layer)
        error = torch.linalg.matrix_norm(two.second_moment(layer) - reference)
        assert error <= 1e-9 * torch.linalg.matrix_norm(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments", "words"),
    [
        (ACCELERATE, ["{m}", "--data", "{f}/none.jsonl"], "error: there is no file"),
        (TORCHRUN, ["{m}", "--data", "{f}/a.jsonl", "--targets", "quer"], "error: no layer 'quer'"),
        (TORCHRUN, ["{m}", "--data", "{f}/a.jsonl", "--device-map", "auto"], "error: --device-map"),
        (TORCHRUN, ["{m}"], "Missing option '--data'"),
    ],
)
def test_several_processes_say_a_mistake_once(
    files, tiny_base, tmp_path, launcher, arguments, words
):
    filled = [a.format(f=files, m=tiny_base) for a in arguments]
    done = launch(launcher, *filled, "--output", tmp_path / "x")
    assert done.returncode != 0
    assert done.stderr.count(words) == 1
    assert "exitcode  : 2" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_accelerate_on_a_cpu_that_starts_one_process_is_noticed(files, tiny_base, tmp_path):
    done = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "2"], tiny_base,
                  "--data", files / "a.jsonl", "--output", tmp_path / "x")  # fmt: skip
    assert done.returncode == 0
    assert "note: accelerate started one process only" in done.stderr


def test_the_page_names_only_what_there_is():
    page = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    commands = re.findall(r"^.*?orthomerge (stats|init) (.*)$", page, re.MULTILINE)
    assert len(commands) >= 8
    helps = {verb: call(verb, "--help") for verb in ("stats", "init")}
    verbs = {verb: call("stats", verb, "--help") for verb in ("inspect", "merge", "publish")}
    for verb, rest in commands:
        text = verbs.get(rest.split()[0], helps[verb])
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in text, (verb, rest)

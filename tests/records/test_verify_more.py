"""`verify` on starts, and conversions done again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call, make_texts, write_task
from small_adapters import make_adapter

from orthomerge import verify
from orthomerge.adapters import ConvertConfig, Converted, convert_adapters, load_trainable
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.io.files import fingerprint
from orthomerge.statistics import Statistics


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory) -> Path:
    """Statistics of three tasks, two adapters, and a start with all that one may have."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc"):
        texts = root / f"{name}.jsonl"
        texts.write_text("\n".join(json.dumps({"text": t}) for t in make_texts(20, seed)))
        call(
            "stats", tiny_base, "--data", texts, "--targets", "query,value", "-o", stats(root, name)
        )
        make_adapter(root / name, tiny_base, seed)
    call("init", tiny_base, "--own", stats(root, "a"), "--others", stats(root, "b"), "--others",
         stats(root, "c"), "--solver", "joint", "--existing", root / "b", "--rank", 2,
         "-o", root / "start")  # fmt: skip
    return root


def stats(root: Path, name: str) -> Path:
    return root / f"{name}.stats.safetensors"


@pytest.fixture
def start(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "start", tmp_path / "start"))


def wrong(path: Path, **how) -> list[tuple[str, str, str]]:
    return [(c.what, c.name, c.state) for c in verify(path, **how) if not c.good]


# Starts ------------------------------------------------------------------------------------------


def test_a_start_names_its_files_and_all_that_it_was_made_from(made, start, tiny_base):
    found = verify(start)
    assert {c.state for c in found} == {"same"}
    assert {c.name for c in found if c.what == "file"} == {p.name for p in start.iterdir()}
    assert {p.name for p in start.iterdir()} > {"kept_out.safetensors", "start.json"}
    inputs = [c.name for c in found if c.what == "input"]
    assert inputs == [str(made / "b"), *(str(stats(made, n)) for n in "abc"), str(tiny_base)]
    record = json.loads((start / "start.json").read_text())
    assert record["config"]["solver"] == "joint"
    assert set(record["captured"]) == set(Statistics.load(stats(made, "b"), lazy=True).layers)


def test_one_byte_of_any_file_of_a_start_is_found(start):
    for file in [p for p in start.iterdir() if p.name != "start.json"]:
        before = file.read_bytes()
        file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        assert wrong(start) == [("file", file.name, "altered")]
        file.write_bytes(before)
    record = json.loads((start / "start.json").read_text())
    record["config"]["seed"] = 7
    (start / "start.json").write_text(json.dumps(record))
    assert wrong(start) == [("file", "start.json", "altered")]


def test_files_of_a_start_that_are_gone_or_new_and_other_inputs_are_found(made, start, tmp_path):
    (start / "kept_out.safetensors").unlink()
    (start / "training.json").write_text("{}")
    assert wrong(start) == [
        ("file", "kept_out.safetensors", "missing"),
        ("file", "training.json", "extra"),
    ]
    elsewhere = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    shutil.copyfile(stats(made, "c"), stats(elsewhere, "b"))
    record = json.loads((elsewhere / "start" / "start.json").read_text())
    told = json.loads(json.dumps(record).replace(str(made), str(elsewhere)))
    told.pop("sha256")
    (elsewhere / "start" / "start.json").write_text(
        json.dumps({**told, "sha256": fingerprint(told)})
    )
    assert wrong(elsewhere / "start") == [("input", str(stats(elsewhere, "b")), "altered")]
    stats(elsewhere, "b").unlink()
    assert not wrong(elsewhere / "start")
    assert wrong(made / "start", adapters=[made / "c"]) == [("input", str(made / "b"), "altered")]


def test_a_start_without_existing_adapters_takes_none_and_is_not_done_again(
    made, tiny_base, tmp_path
):
    call("init", tiny_base, "--others", stats(made, "b"), "--rank", 2, "-o", tmp_path / "s")
    assert {c.state for c in verify(tmp_path / "s")} == {"same"}
    with pytest.raises(AdapterError, match="1 adapters for an output of 0"):
        verify(tmp_path / "s", adapters=[made / "b"])
    with pytest.raises(AdapterError, match="is a start: only merges and conversions"):
        verify(tmp_path / "s", redo=True)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_is_trained_from_a_start_does_not_take_its_record(made, start, tiny_base, tmp_path):
    from transformers import AutoModelForSequenceClassification

    write_task(tmp_path / "rows.jsonl", 40)
    call("train", start, "--task", tmp_path / "rows.jsonl", "--rows", 16, "--epochs", 1,
         "-o", tmp_path / "trained")  # fmt: skip
    assert not (tmp_path / "trained" / "start.json").exists()
    assert not wrong(start)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    assert load_trainable(base, start)


# Conversions -------------------------------------------------------------------------------------

WAYS = [
    {"subspace": "low_energy", "balance": 1.5},
    {"subspace": "project", "subspace_dim": 20},
    {"subspace": "start", "solver": "contrastive", "seed": 3, "options": {"balance": 0.02}},
]


def converted(made: Path, folder: Path, **how) -> list[Converted]:
    return convert_adapters(
        [made / "a", made / "b"], folder, statistics=[stats(made, "a"), stats(made, "b")],
        others=[stats(made, "c")], config=ConvertConfig(**how),
    )  # fmt: skip


@pytest.mark.parametrize("how", WAYS, ids=[w["subspace"] for w in WAYS])
def test_a_conversion_comes_out_again_bit_for_bit(how, made, tmp_path):
    for item in converted(made, tmp_path / "out", **how):
        found = verify(item.path, redo=True)
        assert {c.state for c in found} == {"same"}
        recorded = set(json.loads((item.path / "convert.json").read_text())["files"])
        assert {c.name for c in found if c.what == "redo"} == recorded - {"README.md"}
        assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_a_conversion_that_does_not_come_from_what_it_says_is_found(made, tmp_path):
    """Hashes are no signature: the record is written anew, and only a second conversion tells."""
    item = converted(made, tmp_path / "out")[1]
    file = item.path / "convert.json"
    record = json.loads(file.read_text())
    record.pop("sha256")
    record["config"]["balance"] = 0.5
    file.write_text(json.dumps({**record, "sha256": fingerprint(record)}))
    assert not wrong(item.path)
    assert ("redo", "adapter_model.safetensors", "altered") in wrong(item.path, redo=True)


def test_a_conversion_whose_parts_are_not_here_is_refused(made, tmp_path):
    own, other = Statistics.load(stats(made, "a")), Statistics.load(stats(made, "b"))
    convert_adapters([made / "a"], tmp_path / "memory", statistics=[own], others=[other])
    with pytest.raises(OrthomergeError, match="made with statistics"):
        verify(tmp_path / "memory", redo=True)
    item = converted(made, tmp_path / "out")[0]
    assert not wrong(item.path, redo=True, adapters=[made / "a"])
    with pytest.raises(AdapterError, match="no adapter at"):
        verify(item.path, redo=True, adapters=[tmp_path / "none"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"subspace": "quiet", "colour": 1}}, "how to convert again"),
        ({"config": {"subspace": "low_enrgy"}}, "did you mean 'low_energy'"),
        ({"config": {"balance": "x"}}, "how to convert again"),
        ({"statistics": ["x"]}, "how to convert again"),
        ({"adapters": [{"name": "a"}, {"name": "b"}]}, "not here"),
    ],
)
def test_a_record_of_other_types_cannot_be_converted_again(changes, said, made, tmp_path):
    item = converted(made, tmp_path / "out")[0]
    file = item.path / "convert.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    with pytest.raises(OrthomergeError, match=said):
        verify(item.path, redo=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_the_statistics_of_an_older_record_of_several_are_not_guessed(made, tmp_path):
    """Before, each record listed all own statistics and did not say which was the adapter's."""
    item = converted(made, tmp_path / "out")[0]
    file = item.path / "convert.json"
    record = json.loads(file.read_text())
    first, second, third = record["statistics"]["own"] + record["statistics"]["others"]
    assert [Path(e["path"]).name[0] for e in (first, second, third)] == ["a", "b", "c"]
    record["statistics"] = {"own": [first, second], "others": [third]}
    file.write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="convert again"):
        verify(item.path, redo=True)


def test_a_recovered_conversion_is_as_written_and_is_not_done_again(made, tmp_path):
    write_task(tmp_path / "rows.jsonl", 40)
    call("convert", made / "a", "--own", stats(made, "a"), "--others", stats(made, "b"),
         "--recover", 2, "--task", tmp_path / "rows.jsonl", "--rows", 16,
         "-o", tmp_path / "out")  # fmt: skip
    assert {c.state for c in verify(tmp_path / "out")} == {"same"}
    record = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert record["recovered"]["steps"] == 2 and "training.json" in record["files"]
    with pytest.raises(AdapterError, match="trained after its conversion"):
        verify(tmp_path / "out", redo=True)
    with (tmp_path / "out" / "training.json").open("a") as stream:
        stream.write(" ")
    assert wrong(tmp_path / "out") == [("file", "training.json", "altered")]

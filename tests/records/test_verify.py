"""`verify` finds every file of an output that was touched, whatever kind of output it is."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from small_adapters import make_adapter
from typer.testing import CliRunner

from orthomerge import verify
from orthomerge.adapters import convert_adapters, merge_adapters, merge_to_model
from orthomerge.cli import app
from orthomerge.errors import OrthomergeError
from orthomerge.io.files import fingerprint
from orthomerge.models.assets import resolve_model


@pytest.fixture(scope="module")
def outputs(tiny_base, tmp_path_factory) -> Path:
    """Two adapters, and a merge of each form."""
    root = tmp_path_factory.mktemp("outputs")
    pair = [make_adapter(root / name, tiny_base, seed) for seed, name in enumerate("ab")]
    merge_adapters(pair, method="dare_ties", density=0.5, seed=3, output=root / "adapter")
    merge_adapters(pair, method="tall_masks", output=root / "tasks")
    merge_to_model(pair, root / "model", weights=[1, 0.5], max_shard_size="20KB")
    return root


@pytest.fixture
def copied(outputs, tmp_path) -> Path:
    return Path(shutil.copytree(outputs, tmp_path / "copy"))


def wrong(path: Path, **how) -> list[tuple[str, str, str]]:
    return [(c.what, c.name, c.state) for c in verify(path, **how) if not c.good]


@pytest.mark.parametrize("form", ["adapter", "tasks", "model"])
def test_an_untouched_output_is_as_written_and_comes_out_again(copied, form):
    found = verify(copied / form, redo=True)
    assert all(c.good for c in found)
    inputs = [c for c in found if c.what == "input"]
    # A full model is made of its base; the other forms never read it.
    assert [c.state for c in inputs] == ["same"] * (3 if form == "model" else 2)
    recorded = json.loads((copied / form / "merge.json").read_text())["files"]
    assert sorted(c.name for c in found if c.what == "redo") == sorted(
        name for name in recorded if Path(name).name != "README.md"
    )
    assert not [p for p in copied.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("form", ["adapter", "tasks", "model"])
def test_one_byte_of_any_file_is_found(copied, form):
    folder = copied / form
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 4
    for file in files:
        before = file.read_bytes()
        for place in {0, len(before) // 2, len(before) - 2}:
            changed = bytearray(before)
            changed[place] ^= 1
            file.write_bytes(changed)
            try:
                name = file.relative_to(folder).as_posix()
                assert ("file", name, "altered") in wrong(folder)
            except OrthomergeError:
                assert file.name == "merge.json"  # it is no JSON any more
            finally:
                file.write_bytes(before)
    assert not wrong(folder)


def test_a_file_that_is_gone_or_new_is_found(copied):
    folder = copied / "tasks"
    (folder / "tasks" / "a" / "adapter_model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / ".gitattributes").write_text("a repository's own")
    assert wrong(folder) == [
        ("file", "tasks/a/adapter_model.safetensors", "missing"),
        ("file", "pytorch_model.bin", "extra"),
    ]


def test_other_inputs_are_found_and_absent_ones_are_no_fault(outputs, copied, tiny_base):
    folder = copied / "adapter"
    other = make_adapter(copied / "other", tiny_base, 7)
    assert wrong(folder, adapters=[outputs / "a", other]) == [
        ("input", str(outputs / "b"), "altered")
    ]
    config = json.loads((outputs / "b" / "adapter_config.json").read_text())
    same = Path(shutil.copytree(outputs / "b", copied / "scaled"))
    (same / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    assert wrong(folder, adapters=[outputs / "a", same])
    nowhere = [copied / "none", copied / "none"]
    assert [c.state for c in verify(folder, adapters=nowhere) if c.what == "input"] == [
        "not here", "not here",
    ]  # fmt: skip
    with pytest.raises(OrthomergeError, match="1 adapters for an output of 2"):
        verify(folder, adapters=[other])


def test_a_record_that_was_written_anew_does_not_survive_a_second_merge(copied):
    """Hashes are no signature: whoever changes the weights and the record is found by --redo."""
    folder = copied / "adapter"
    record = json.loads((folder / "merge.json").read_text())
    record.pop("sha256")
    record["options"]["density"] = 0.9
    (folder / "merge.json").write_text(json.dumps({**record, "sha256": fingerprint(record)}))
    assert not wrong(folder)
    assert ("redo", "adapter_model.safetensors", "altered") in wrong(folder, redo=True)


def test_a_dense_merge_of_before_ranks_were_cut_is_made_again_as_it_was(copied):
    """Its record has no rank, and another one holds the rank of a run among the options."""
    parts = [copied / "a", copied / "b"]
    for rank, options in (("full", {}), (3, {"rank": 3})):
        folder = copied / f"old-{rank}"
        merge_adapters(parts, method="ties", rank=rank, weights=1.0, output=folder)
        record = json.loads((folder / "merge.json").read_text())
        record.pop("sha256")
        record |= {"rank": None if rank == "full" else rank, "options": options}
        (folder / "merge.json").write_text(json.dumps({**record, "sha256": fingerprint(record)}))
        assert not wrong(folder, redo=True)


@pytest.mark.parametrize("name", ["../a/adapter_config.json", "/etc/hostname", "a\\..\\b", ""])
def test_a_record_that_names_a_file_outside_is_refused(copied, name):
    file = copied / "adapter" / "merge.json"
    record = json.loads(file.read_text())
    record["files"][name] = "0" * 64
    file.write_text(json.dumps(record))
    with pytest.raises(OrthomergeError, match="not inside the folder"):
        verify(copied / "adapter")


def test_statistics_and_conversions_are_verified(copied, tiny_base, tmp_path):
    from orthomerge import Statistics
    from orthomerge.moments import SecondMoment
    from orthomerge.statistics.file import StatisticsMeta

    of_base = resolve_model(str(tiny_base)).sha256
    layers = [f"encoder.layer.{i}.attention.self.{n}" for i in range(2) for n in ("query", "value")]
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        moments = {name: SecondMoment(32).update(torch.randn(80, 32)) for name in layers}
        meta = StatisticsMeta(
            "tiny", "c" * 64, ["query", "value"], "token", 80, model_sha256=of_base
        )
        item = Statistics(moments, {name: name for name in layers}, meta)
        files.append(item.save(tmp_path / f"{seed}.stats.safetensors"))
    convert_adapters(
        [copied / "a"], output=tmp_path / "converted", statistics=[files[0]], others=[files[1]]
    )
    found = verify(tmp_path / "converted")
    assert all(c.state == "same" for c in found)
    inputs = [c.name for c in found if c.what == "input"]
    assert inputs[1:] == [*(str(f) for f in files), str(tiny_base)]

    assert [c.state for c in verify(files[0])] == ["same"]
    data = bytearray(files[0].read_bytes())
    data[-9] ^= 1
    files[0].write_bytes(data)
    assert [c.state for c in verify(files[0])] == ["altered"]
    assert wrong(tmp_path / "converted") == [("input", str(files[0]), "altered")]


def test_the_command_says_a_line_a_file_and_exits_with_what_it_found(copied, monkeypatch):
    monkeypatch.chdir(copied)
    run = partial(CliRunner().invoke, app)
    done = run(["verify", "adapter", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["ok"]
    with (copied / "adapter" / "README.md").open("a") as stream:
        stream.write("!")
    done = run(["verify", "adapter"])
    assert done.exit_code == 1
    states = [line.split() for line in done.stdout.splitlines()]
    assert ["altered", "file", "README.md"] in states
    assert "1 of 8 differ" in done.stdout
    assert isinstance(run(["verify", "a"]).exception, OrthomergeError)

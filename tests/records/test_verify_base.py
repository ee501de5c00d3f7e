"""`verify` and the base model: held to its hash where it is here, and never fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import call, make_texts
from small_adapters import make_adapter

from orthomerge import convert_adapters, merge_adapters, merge_to_model, verify
from orthomerge.errors import OrthomergeError
from orthomerge.models.assets import nothing_fetched, resolve_model

KINDS = ["model", "converted", "start", "merged_by_statistics"]


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory) -> Path:
    """A base of its own, and every kind of output that is made with it or with statistics of it."""
    root = tmp_path_factory.mktemp("made")
    base = Path(shutil.copytree(tiny_base, root / "base"))
    pair = [make_adapter(root / name, base, seed) for seed, name in enumerate("ab")]
    files = [stats(root, base, name) for name in "ab"]
    merge_adapters(pair, output=root / "merged")
    merge_adapters(pair, method="regmean", statistics=files, output=root / "merged_by_statistics")
    merge_to_model(pair, root / "model")
    convert_adapters([pair[0]], root / "converted", statistics=files[:1], others=files[1:])
    call("init", base, "--others", files[1], "--rank", 2, "-o", root / "start")
    return root


def stats(root: Path, base: Path, name: str) -> Path:
    texts, file = root / f"{name}.jsonl", root / f"{name}.stats.safetensors"
    texts.write_text("\n".join(json.dumps({"text": t}) for t in make_texts(20, ord(name))))
    call("stats", base, "--data", texts, "--targets", "query,value", "-o", file)
    return file


def base_of(folder: Path, **how) -> list[tuple[str, str]]:
    """The states of the base and what is said of it."""
    return [(c.state, c.note) for c in verify(folder, **how) if "base model" in c.note]


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_held_to_its_hash_where_it_is_here(made, kind, tmp_path):
    assert base_of(made / kind) == [("same", "the base model")]
    other = Path(shutil.copytree(made / "base", tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (other / "model.safetensors").write_bytes(data)
    ((state, note),) = base_of(made / kind, base=str(other))
    assert state == "altered" and str(other) in note
    assert not all(c.good for c in verify(made / kind, base=str(other)))
    moved = shutil.copytree(made / "base", tmp_path / "moved")
    assert base_of(made / kind, base=str(moved)) == [("same", "the base model")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_not_here_is_not_checked_and_no_fault(made, kind, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    ((state, note),) = base_of(made / kind, base=nowhere)
    assert state == "not here" and "not checked" in note
    assert all(c.good for c in verify(made / kind, base=nowhere))


def test_a_merge_that_never_read_its_base_says_nothing_of_it(made):
    assert json.loads((made / "merged" / "merge.json").read_text())["base_sha256"] is None
    assert base_of(made / "merged") == []


def test_a_conversion_is_done_again_with_the_base_that_was_named(made, tmp_path):
    """The adapter's own name of it leads to another model, whose statistics these are not."""
    other = Path(shutil.copytree(made / "base", tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (other / "model.safetensors").write_bytes(data)
    adapter = make_adapter(tmp_path / "a", other, 0)
    files = [made / f"{name}.stats.safetensors" for name in "ab"]
    how = {"statistics": files[:1], "others": files[1:]}
    with pytest.raises(OrthomergeError, match="whose weights are not those"):
        convert_adapters([adapter], tmp_path / "out", **how)
    convert_adapters([adapter], tmp_path / "out", base=str(made / "base"), **how)
    found = verify(tmp_path / "out", redo=True)
    assert {c.state for c in found} == {"same"}


def test_a_model_is_made_again_of_the_base_that_lies_elsewhere_now(made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "copy"))
    record = json.loads((root / "model" / "merge.json").read_text())
    assert record["base"] is None and record["base_model"] == str(made / "base")
    moved = shutil.move(root / "base", tmp_path / "moved")
    pair = [root / "a", root / "b"]
    found = verify(root / "model", redo=True, base=str(moved), adapters=pair)
    assert {c.state for c in found} == {"same"}


def test_nothing_is_fetched(made, monkeypatch, tmp_path):
    """A base by an id of the hub: got for the merge, looked for on this machine afterwards."""
    asked: list[bool] = []

    def snapshot(name, *, local_files_only, **_):
        asked.append(local_files_only)
        if local_files_only and gone:
            raise FileNotFoundError(name)
        return str(made / "base")

    gone = False
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    pair = [Path(shutil.copytree(made / name, tmp_path / name)) for name in "ab"]
    for folder in pair:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "somebody/tiny"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    merge_to_model(pair, tmp_path / "model")
    assert False in asked
    asked.clear()
    assert {c.state for c in verify(tmp_path / "model", redo=True)} == {"same"}
    gone = True
    assert base_of(tmp_path / "model")[0][0] == "not here"
    with pytest.raises(OrthomergeError, match="no model 'somebody/tiny'"):
        verify(tmp_path / "model", redo=True)
    assert set(asked) == {True}
    with nothing_fetched(), pytest.raises(OrthomergeError):
        resolve_model("somebody/tiny")
    gone = False
    assert resolve_model("somebody/tiny").source == "hub"
    assert asked[-1] is False

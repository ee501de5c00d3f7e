"""Writing without halves, and hashes: every file is written to a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError
from orthomerge.io.disk import Holder, flush, put


@contextmanager
def atomic_path(target: str | Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """A temporary path beside `target` that replaces it on success and vanishes on failure.

    The caller may make a file or a folder at the yielded path. A folder replaces an older folder
    of the same name if orthomerge wrote all of it; with `replace` the caller vouches for that.
    Killed at any moment, all of the old or all of the new is at `target`.

    Raises:
        OutputError: a folder at the target holds what orthomerge did not write.
        OrthomergeError: the target cannot be written, or the disk is full or fails meanwhile.
    """
    target = Path(target)
    _check_folder(target, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Holder(target)
    except OSError as problem:
        raise disk_error(problem, target) or _unwritable(target, problem) from problem
    try:
        path = holder.folder / target.name
        yield path
        _open_to_umask(path)
        flush(path)
        _check_folder(target, replace)
        try:
            put(path, target)
        except OSError as problem:
            raise disk_error(problem, target) or _unwritable(target, problem) from problem
    except Exception as problem:
        said = disk_error(problem, target)
        if said is not None:
            raise said from problem
        raise
    finally:
        holder.close()


def _check_folder(target: Path, replace: bool) -> None:
    from orthomerge.io.outputs import require_ours

    if target.is_dir() and not replace:
        require_ours(target)


def local(named: str | Path) -> Path:
    """The path that somebody wrote, `~` being the user's home.

    Raises:
        OrthomergeError: the home of nobody here, a name longer than a file's may be, or a folder
            on the way that may not be entered.
    """
    said = str(named) if len(str(named)) <= 80 else f"{str(named)[:77]}..."
    try:
        path = Path(named).expanduser()
        path.exists()
    except RuntimeError as problem:
        raise OrthomergeError(
            f"'{said}' names the home of nobody on this machine: write the path in full."
        ) from problem
    except OSError as problem:
        raise OrthomergeError(
            f"'{said}' cannot be looked for: {problem.strerror or problem}; name another path."
        ) from problem
    return path


def is_folder(named: str | Path) -> bool:
    """Whether what somebody wrote is a folder here; what can be no path is none."""
    try:
        return local(named).is_dir()
    except OrthomergeError:
        return False


def _unwritable(target: Path, problem: OSError) -> OrthomergeError:
    return OrthomergeError(
        f"cannot write '{target}': {problem.strerror or problem}; choose another output path."
    )


def disk_error(problem: BaseException, target: str | Path) -> OrthomergeError | None:
    """The error for a write that the disk refused; None where it was something else."""
    code = _disk_code(problem)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return full_disk(target)
    if code == errno.EFBIG:
        return OrthomergeError(
            f"a file of '{target}' is larger than this process may write: raise its limit (ulimit "
            "-f) and call the same command again; whatever was finished is kept."
        )
    if code in (errno.EIO, errno.EROFS):
        return OrthomergeError(
            f"the disk of '{target}' failed ({os.strerror(code)}): mend it or choose another "
            "output path, then call the same command again; whatever was finished is kept."
        )
    return None


def _disk_code(problem: BaseException | None) -> int | None:
    """The disk's errno under a problem; safetensors names it in the text of an error of its own."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in _OF_THE_DISK:
            return problem.errno
        named = re.search(r"\(os error (\d+)\)", str(problem))
        if named and int(named[1]) in _OF_THE_DISK:
            return int(named[1])
        problem = problem.__cause__
    return None


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def full_disk(target: str | Path) -> OrthomergeError:
    """The error for a full disk."""
    return OrthomergeError(
        f"no space left on the disk for '{target}': free some and call the same command again; "
        "whatever was finished is kept."
    )


def _open_to_umask(path: Path) -> None:
    """Give files the mode any other program would: some writers leave them to their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for item in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if item.is_file() and not item.is_symlink():
            item.chmod(0o666 & ~umask)


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to a text file and have them on disk before returning.

    A last line left half-written by a kill is cut off first, so that no new line is lost with it.

    Raises:
        OrthomergeError: the file cannot be written, or the disk is full or fails.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, "".join(f"{line}\n" for line in lines))
    except OSError as problem:
        raise disk_error(problem, path) or _unwritable(path, problem) from problem


def _append(path: Path, text: str) -> None:
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                begin = path.read_bytes().rfind(b"\n") + 1
                stream.seek(begin)
                if _is_json(stream.read()):  # whole, but for its end
                    stream.write(b"\n")
                else:
                    stream.truncate(begin)
        stream.write(text.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def copy_inside(source: Path, target: Path, root: Path) -> None:
    """Copy a file below `root`; a link that leads elsewhere could give a secret away.

    The hub's cache keeps the files of `snapshots/<commit>` as links to `blobs` beside it.

    Raises:
        OrthomergeError: the file is a link to outside `root`.
    """
    real, home = source.resolve(), root.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and real.parent != blobs:
        raise OrthomergeError(
            f"'{source}' is a link to outside '{root}', which is not followed: put the file itself "
            "there, or remove the link."
        )
    shutil.copyfile(real, target)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def holds(path: Path, text: str) -> bool:
    """Whether a file is there and holds this text; no more than the text's length is read."""
    data = text.encode("utf-8")
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(data) + 1) == data


def write_text(target: str | Path, text: str) -> None:
    """Write `text` to `target` at once or not at all."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, at once or not at all."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value: equal values give equal hashes whatever the key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in chunks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """A file's SHA-256, computed once per process as long as the file does not change.

    A file that gets another name is the same file.
    """
    state = _state(path)
    if state not in _KNOWN:
        _keep(state, file_sha256(path))
    return _KNOWN[state]


def remember_sha256(path: Path, digest: str) -> None:
    """Have `known_sha256` give the hash of a file that was computed while it was written."""
    _keep(_state(path), digest)


_KNOWN: dict[tuple[int, ...], str] = {}
_MOST_KNOWN = 4096


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _keep(state: tuple[int, ...], digest: str) -> None:
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[state] = digest


def slug(name: str) -> str:
    """A name made safe as one part of a path: nothing that leaves the folder or hides in it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "unnamed"


def derive_seed(seed: int, *names: str) -> int:
    """A seed of its own for each list of names: 31 bits of SHA-256, so that numpy takes it too."""
    text = "\0".join([str(seed), *names]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1

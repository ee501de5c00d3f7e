"""What survives a kill or a power cut: durable files, a swap of two folders, holders of halves.

A holder is the temporary folder in which one output is written. While its writer lives it is
locked; one whose lock is free was left by a killed writer, and whoever comes next removes it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

# In the name of every holder, of the lock inside it, and of an older folder on its way out.
_MARK, _LOCK, _OLD = ".part-", ".writer", ".old"
_SWAP, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_ATTEMPTS = 5
# What a kernel or a file system without the swap answers.
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class Holder:
    """A locked temporary folder beside `target`, in which its next content is written."""

    def __init__(self, target: Path) -> None:
        for stale in target.parent.glob(f".{glob.escape(target.name)}{_MARK}*"):
            _remove(stale)
        for attempt in range(_ATTEMPTS):
            made = tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=target.parent)
            self.folder = Path(made)
            self._lock = _lock_of(self.folder)
            try:
                self._lock.acquire(timeout=0)
                return
            except NotImplementedError:
                return  # a file system without locks: nobody can tell when this writer has died
            except (FileNotFoundError, Timeout):
                # Another writer of the name took it for one that was left.
                if attempt == _ATTEMPTS - 1:
                    raise
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left below `folder`; a holder whose writer lives is left alone.

    Only for a folder in which nobody begins to write meanwhile.
    """
    for holder in Path(folder).rglob(f".*{_MARK}*"):
        if holder.is_dir():
            _remove(holder)


def _remove(holder: Path) -> None:
    """Remove a holder whose writer is dead, and put back what it was about to replace."""
    if not (holder / _LOCK).is_file():
        with suppress(OSError):  # in use where locks are not known
            holder.rmdir()
        return
    lock = _lock_of(holder)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):
        return
    name = holder.name[1:].rpartition(_MARK)[0]
    old, target = holder / f"{name}{_OLD}", holder.parent / name
    if old.exists() and not target.exists():
        with suppress(OSError):  # another process was quicker
            old.replace(target)
    lock.release()
    shutil.rmtree(holder, ignore_errors=True)


def _lock_of(holder: Path) -> FileLock:
    return FileLock(holder / _LOCK)


def put(path: Path, target: Path) -> None:
    """Give `path` the name `target`; what had it is gone at once, or stays whole.

    Where the system cannot swap two folders they change places in two steps, and what a kill
    between the two leaves is put back by the next holder of that name.
    """
    if path.is_dir() and target.is_dir():
        if not _swapped(path, target):
            _replace_in_two_steps(path, target)
    else:
        path.replace(target)
    _flush(target.parent)


def _swapped(path: Path, target: Path) -> bool:
    """Exchange two names in one step, where Linux and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _LINUX else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(path), _HERE, os.fsencode(target), _SWAP) == 0:
        return True
    problem = ctypes.get_errno()
    if problem in _NO_SWAP:
        return False
    raise OSError(problem, os.strerror(problem), str(target))


_LINUX = sys.platform == "linux"


def _replace_in_two_steps(path: Path, target: Path) -> None:
    old = path.with_name(f"{target.name}{_OLD}")
    try:
        target.replace(old)
        path.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise


def flush(path: Path) -> None:
    """Have a file, or a folder with all that is in it, on disk before it gets its name."""
    if path.is_dir():
        for item in path.iterdir():
            if not item.is_symlink():
                flush(item)
    _flush(path)


def _flush(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system knows it
            raise
    finally:
        os.close(descriptor)

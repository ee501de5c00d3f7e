"""Faults put into a process from within: the k-th operation on a disk is refused, or is its last.

Python's own audit events say when a file is opened to write, a folder made or a name changed, with
all that runs in the process under the same watch; what no event tells of (a flush, the swap of two
names, the files safetensors writes in Rust) is wrapped.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Counts the operations below `root`; at number `at` does what `fault` says."""

    def __init__(self) -> None:
        self.root = ""
        self.count = self.at = 0
        self.stays = False
        self.fired = False
        self.fault: Callable[[str], None] | None = None

    def arm(
        self, root: Path, at: int, fault: Callable[[str], None] | None, *, stays: bool = False
    ) -> None:
        self.root, self.at, self.fault, self.stays = str(root), at, fault, stays
        self.count, self.fired = 0, False

    def operation(self, path: object, *, forward: bool = True) -> None:
        """One is about to be done; those that only clear away meet no refusal."""
        if not self.root or not str(path).startswith(self.root):
            return
        self.count += 1
        now = self.count == self.at or (self.stays and self.fired)
        if now and self.fault is not None and (forward or self.fault in (kill, end)):
            self.fired = True
            self.fault(str(path))


disk = Disk()


def kill(path: str) -> None:
    """The process is gone before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def end(path: str) -> None:
    """The process is asked to end before the operation."""
    os.kill(os.getpid(), signal.SIGTERM)


def refuse(code: int) -> Callable[[str], None]:
    """The system refuses the operation with an errno."""

    def fault(path: str) -> None:
        raise OSError(code, os.strerror(code), path)

    return fault


def watch() -> None:
    """Begin to watch this process; to be called once."""
    import safetensors.torch

    from orthomerge.io import disk as ours

    sys.addaudithook(_audit)
    flush, swap, write = os.fsync, ours._swapped, safetensors.torch.serialize_file

    def fsync(descriptor: int) -> None:
        disk.operation(Path(f"/proc/self/fd/{descriptor}").readlink() if _LINUX else disk.root)
        flush(descriptor)

    def swapped(path: Path, target: Path) -> bool:
        disk.operation(target)
        return swap(path, target)

    def serialize(tensors, filename, metadata=None, **more):
        write(tensors, filename, metadata, **more)
        before = disk.fired
        try:
            disk.operation(filename)
        finally:
            if disk.fired and not before:  # half of it got there
                os.truncate(filename, Path(filename).stat().st_size // 2)

    os.fsync, ours._swapped = fsync, swapped
    safetensors.torch.serialize_file = serialize


_LINUX = sys.platform == "linux"


def _audit(event: str, arguments: tuple) -> None:
    if not disk.root:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        disk.operation(arguments[0])
    elif event == "os.rename":
        disk.operation(arguments[1])
    elif event == "os.mkdir":
        disk.operation(arguments[0])
    elif event in ("os.remove", "os.rmdir"):
        disk.operation(arguments[0], forward=False)

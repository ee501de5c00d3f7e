"""The kinds of faults: each draws one for the state a run is in, or says why it cannot be had."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from injection import disk, end, kill, refuse
from sitting import Outcome, after, forked

from orthomerge.experiment import run, schedule

WEEKS = 5000
DISKS: list[Path] = []


class Fault(NamedTuple):
    """A sitting with a fault in it; `damaged` where the folder was changed from outside."""

    happen: Callable[[], Outcome]
    damaged: bool = False


def at_an_operation(fault, *, stays: bool = False):
    def drawn(campaign) -> Fault:
        at = campaign.draw.randint(1, max(campaign.operations // 4, 2))

        def arm() -> None:
            disk.arm(campaign.folder, at, fault, stays=stays)

        return Fault(lambda: forked(campaign.recipe, campaign.folder, arm))

    return drawn


def at_a_moment(campaign) -> Fault:
    strike = after(campaign.draw.uniform(0, campaign.seconds / 4))
    return Fault(lambda: forked(campaign.recipe, campaign.folder, during=strike))


def size_limit(campaign) -> Fault:
    most = campaign.draw.choice([0, 300, 1500, 4000, 9000])

    def arm() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def happen() -> Outcome:
        # The limit is lifted to tell of it: what is said goes to a file too.
        found = forked(campaign.recipe, campaign.folder, _lifted(arm))
        return found._replace(fired=found.code == 2)

    return Fault(happen)


def _lifted(arm: Callable[[], None]) -> Callable[[], None]:
    """The limit holds until the process writes what it says."""
    write = Path.write_text

    def before() -> None:
        arm()

        def lifted(self: Path, *arguments, **more):
            if self.suffix == ".said":
                limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            return write(self, *arguments, **more)

        Path.write_text = lifted  # in the forked process alone

    return before


def full_tmpfs(campaign) -> Fault | str:
    """The run's folder on a disk of its own, with a little room more each time."""
    why = _mounted(campaign)
    if why:
        return why
    used = sum(p.stat().st_blocks * 512 for p in campaign.folder.rglob("*") if p.is_file())
    size = used + campaign.draw.randint(4, 120) * 1024

    def happen() -> Outcome:
        _remount(campaign.folder, f"size={size}")
        found = forked(campaign.recipe, campaign.folder)
        _remount(campaign.folder, "size=64m")
        return found._replace(fired=found.code == 2)

    return Fault(happen)


def read_only(campaign) -> Fault | str:
    why = _mounted(campaign)
    if why and os.geteuid() == 0:
        return why  # nothing is read-only to root but a whole disk

    def happen() -> Outcome:
        if why:
            campaign.folder.mkdir(exist_ok=True)
            campaign.folder.chmod(0o555)
        else:
            _remount(campaign.folder, "ro")
        found = forked(campaign.recipe, campaign.folder)
        if why:
            campaign.folder.chmod(0o755)
        else:
            _remount(campaign.folder, "rw")
        return found._replace(fired=found.code == 2)

    return Fault(happen)


def _mounted(campaign) -> str:
    """Put a small disk at a run's folder, if it has none; why it cannot be had, or nothing."""
    folder = campaign.folder
    if folder in DISKS:
        return ""
    if os.geteuid() != 0:
        return "only root may mount a disk"
    folder.mkdir(exist_ok=True)
    before = folder.with_name(folder.name + ".before")
    subprocess.run(["cp", "-a", str(folder), str(before)], check=True)
    asked = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(asked, capture_output=True, check=False, text=True)
    if done.returncode:
        shutil.rmtree(before)
        return f"this process may not mount: {done.stderr.strip()}"
    subprocess.run(["cp", "-a", f"{before}/.", str(folder)], check=True)
    shutil.rmtree(before)
    campaign.state.moved(folder)
    DISKS.append(folder)
    return ""


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def release(folder: Path) -> None:
    """Take a run's disk away again."""
    if folder in DISKS:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        DISKS.remove(folder)


def damage(how: Callable[[Path, object], None]):
    def drawn(campaign) -> Fault:
        hidden = (".lock", ".writer")
        files = sorted(
            p for p in campaign.folder.rglob("*") if p.is_file() and p.name not in hidden
        )

        def happen() -> Outcome:
            if not files:
                disk_kill = at_an_operation(kill)(campaign)
                return disk_kill.happen()._replace(fired=False)
            file = campaign.draw.choice(files)
            campaign.state.excuse(campaign.folder, file)
            how(file, campaign.draw)
            at = campaign.draw.randint(campaign.operations // 8, campaign.operations // 2)
            found = forked(
                campaign.recipe, campaign.folder,
                lambda: disk.arm(campaign.folder, at, kill),
            )  # fmt: skip
            return found._replace(fired=True)

        return Fault(happen, damaged=True)

    return drawn


def cut(path: Path, draw) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, draw.randrange(max(size, 1)), max(size - 1, 0)]))


def lose(path: Path, draw) -> None:
    path.unlink()


def second_run(campaign) -> Fault:
    """While one is at work another is called, which must refuse and touch nothing."""

    def happen() -> Outcome:
        other: list[Outcome] = []

        def during(child: int) -> bool:
            os.kill(child, signal.SIGSTOP)
            other.append(forked(campaign.recipe, campaign.folder))
            os.kill(child, signal.SIGCONT)
            os.kill(child, signal.SIGKILL)
            return False

        first = forked(campaign.recipe, campaign.folder, during=during)
        if first.code == 0:
            return first
        refused = other[0].code == 2 and "another run is at work" in other[0].said
        return Outcome(2, other[0].said, True) if refused else Outcome(1, str(other[0]), True)

    return Fault(happen)


def clock(campaign) -> Fault:
    """Wall clocks that jump by up to a century each time they are read, and files from then."""
    at = campaign.draw.randint(2, max(campaign.operations // 4, 3))
    real = time.time

    def jump() -> float:
        return campaign.draw.uniform(-WEEKS, WEEKS) * 7 * 86400

    def arm() -> None:
        time.time = lambda: real() + jump()

        class Jumps(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(seconds=jump() / 10)

        schedule.datetime = run.datetime = Jumps
        disk.arm(campaign.folder, at, kill)

    return Fault(lambda: forked(campaign.recipe, campaign.folder, arm))


KINDS: dict[str, Callable[..., Fault | str]] = {
    "SIGKILL before an operation on the disk": at_an_operation(kill),
    "SIGKILL at a moment": at_a_moment,
    "SIGTERM before an operation on the disk": at_an_operation(end),
    "full disk (ENOSPC), from an operation on": at_an_operation(refuse(errno.ENOSPC), stays=True),
    "quota used up (EDQUOT), from an operation on": at_an_operation(
        refuse(errno.EDQUOT), stays=True
    ),
    "failing disk (EIO), once": at_an_operation(refuse(errno.EIO)),
    "disk turned read-only (EROFS), from an operation on": at_an_operation(
        refuse(errno.EROFS), stays=True
    ),
    "file size limit (RLIMIT_FSIZE)": size_limit,
    "a really full disk (tmpfs)": full_tmpfs,
    "read-only folder": read_only,
    "a file cut short between two sittings": damage(cut),
    "a file lost between two sittings": damage(lose),
    "a second run in the folder": second_run,
    "a clock that jumps, then SIGKILL": clock,
}

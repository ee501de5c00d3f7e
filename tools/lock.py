"""Write `requirements*.txt` from `pyproject.toml` (`make lock`).

- `requirements.txt`: what `make demo` installs, every file by its SHA-256, for CPython 3.11 to 3.13
  on all systems. Pins that are there stay while `pyproject.toml` admits them; `--upgrade` takes the
  newest. CUDA's libraries are left out: they come with the CUDA build of torch alone, which a
  machine without a GPU does not need; pip brings them afterwards where that build was installed.
- `requirements-cpu.txt`: the CPU build of that torch by its SHA-256, where pip finds one when this
  is run. Given both builds' hashes pip takes the index's own, so `make setup` asks for it first.
- `requirements-lowest.txt`: the lowest version of every direct dependency that the ranges admit,
  for `make test-lowest`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "requirements.txt"
CPU = ROOT / "requirements-cpu.txt"
LOWEST = ROOT / "requirements-lowest.txt"
CUDA = re.compile(r"(cuda-|nvidia-|triton==)")
HEAD = "# Written by `make lock` from pyproject.toml: {what}\n"


def compiled(*options: str) -> str:
    """What the resolver says, without the addresses it asked."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"),
        *("--universal", "--python-version", "3.11", "--no-header", "--no-annotate"),
        *("--no-emit-index-url", "--no-emit-find-links", *options),
    ]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def without_cuda(text: str) -> str:
    """The requirements but those of a CUDA build; one requirement goes over several lines."""
    blocks = re.split(r"\n(?=\S)", text.strip())
    return "\n".join(block for block in blocks if not CUDA.match(block)) + "\n"


def torch_at_hand(pinned: str) -> str | None:
    """The CPU build of the pinned torch, by hash, where pip finds one."""
    found = re.search(r"^torch==(\S+)", pinned, re.MULTILINE)
    assert found is not None
    wanted = f"torch=={found.group(1)}+cpu"
    with tempfile.TemporaryDirectory() as folder:
        command = [*(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"), "--dest"]
        if subprocess.run([*command, folder, wanted], capture_output=True).returncode:
            return None
        (wheel,) = Path(folder).iterdir()
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{wanted} \\\n    --hash=sha256:{digest}\n"


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="the newest versions admitted")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"
        pins = re.findall(r"^([\w.-]+==[^\s;\\]+)(.*)$", PINNED.read_text(), re.MULTILINE)
        # A pin that holds for some systems alone is none for the others.
        always = [pin for pin, rest in pins if ";" not in rest]
        kept.write_text("" if upgrade else "\n".join(always) + "\n")
        text = compiled("--extra", "tune", "--generate-hashes", "--constraint", str(kept))
    head = HEAD.format(what="what `make demo` installs, by hash.")
    PINNED.write_text(head + without_cuda(text))
    if (torch := torch_at_hand(text)) is not None:
        CPU.write_text(HEAD.format(what="torch without CUDA, by hash.") + torch)
    head = HEAD.format(what="the lowest versions its ranges admit.")
    LOWEST.write_text(head + compiled("--resolution", "lowest-direct"))


if __name__ == "__main__":
    main()

"""What a wheel must carry, and what the files of pins promise."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = ROOT / "src" / "orthomerge"


def pins(file: str) -> dict[str, list[str]]:
    """Every version that a file of requirements pins, and the lines that belong to it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks = [b for b in re.split(r"\n(?=\S)", text) if not b.startswith("#")]
    return {canonicalize_name(b.split("==")[0]): b.splitlines() for b in blocks}


def admitted(file: str) -> None:
    held = pins(file)
    for line in PROJECT["project"]["dependencies"]:
        wanted = Requirement(line)
        first = held[canonicalize_name(wanted.name)][0]
        version = first.split("==")[1].split()[0]
        assert version in wanted.specifier, f"run `make lock`: {file} has {first}, not {line}"


def test_the_pins_are_within_the_ranges_of_the_project():
    admitted("requirements.txt")
    admitted("requirements-lowest.txt")


def test_the_lowest_are_the_lower_bounds():
    held = pins("requirements-lowest.txt")
    for line in PROJECT["project"]["dependencies"]:
        wanted = Requirement(line)
        (bound,) = [s.version for s in wanted.specifier if s.operator == ">="]
        version = held[canonicalize_name(wanted.name)][0].split("==")[1].split()[0]
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), f"run `make lock`: {line}"


def test_every_pinned_package_has_hashes_and_no_address():
    for name, lines in pins("requirements.txt").items():
        assert any("--hash=sha256:" in line for line in lines[1:]), name
    for file in ("requirements.txt", "requirements-cpu.txt", "requirements-lowest.txt"):
        assert "://" not in (ROOT / file).read_text(encoding="utf-8")


def test_the_build_without_cuda_is_of_the_pinned_torch():
    pinned = pins("requirements.txt")["torch"][0].split()[0]
    line, digest = pins("requirements-cpu.txt")["torch"]
    assert line.split()[0] == f"{pinned}+cpu"
    assert "--hash=sha256:" in digest


def test_every_file_beside_the_code_is_package_data():
    globs = PROJECT["tool"]["setuptools"]["package-data"]["orthomerge"]
    beside = [
        p.relative_to(SOURCE).as_posix()
        for p in SOURCE.rglob("*")
        if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    ]
    assert {"py.typed", "recipes/demo.yaml", "report/page.html"} <= set(beside)
    for name in beside:
        fits = any(fnmatch(name, g.replace("**/", "*")) for g in globs)
        assert fits, f"{name} would not be in the wheel: add it to package-data"

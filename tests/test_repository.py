"""Files that only a host or another tool reads: they parse, and call verbs that exist."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
VERBS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def verbs_called(text: str) -> set[str]:
    """The targets of every `make` line."""
    lines = re.findall(r"(?:^|run: |\n)make ((?:[a-z-]+ ?)+)", text)
    return {word for line in lines for word in line.split()}


def test_the_hosts_ci_calls_the_verbs_that_the_own_ci_calls():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    own = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {"lint", "types", "imports", "docs", "test"} <= verbs_called(own)
    assert verbs_called(own) <= verbs_called(workflow) <= VERBS


def test_the_matrix_has_every_python_that_is_promised():
    matrix = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    asked = {*matrix["dependencies"], *(more["dependencies"] for more in matrix["include"])}
    assert asked == {"pinned", "newest", "lowest"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={matrix['python'][0]}"


def test_slow_tests_run_every_night():
    workflow = read(".github/workflows/ci.yml")
    assert workflow[True]["schedule"]  # YAML reads the key `on` as true
    slow = workflow["jobs"]["slow"]
    assert slow["strategy"]["matrix"]["verb"] == ["test-all", "coverage"]
    assert {"run": "make ${{ matrix.verb }}"} in slow["steps"]
    assert {"run": "make audit"} in workflow["jobs"]["audit"]["steps"]


def test_the_citation_names_the_paper_and_this_version():
    found = read("CITATION.cff")
    assert found["version"] == version("orthomerge")
    assert found["license"] == "Apache-2.0"
    assert "2505.22934" in found["preferred-citation"]["url"]


def test_the_templates_can_be_read():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        found = read(str(path.relative_to(ROOT)))
        assert "blank_issues_enabled" in found or (found["name"] and found["body"])
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "imports"}


def test_contributing_lists_every_module():
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```text")[2]
    listed = set(re.findall(r"[\w]+\.py|\w+/", house.partition("```")[0]))
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "src" / "orthomerge").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert there - {"__init__.py", "__main__.py"} <= listed, "say in CONTRIBUTING.md what it holds"

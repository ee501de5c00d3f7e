"""The reference of the Python names: every name of `orthomerge.__all__`, by its home."""

from __future__ import annotations

import orthomerge

TITLES = {
    "adapters": "Adapters: start, constrain, convert, merge",
    "diagnostics": "Diagnosis",
    "errors": "Errors",
    "experiment": "Recipes and runs",
    "factors": "Factors",
    "features": "Statistics",
    "fisher": "Fisher information",
    "merging": "Merging, on factors alone",
    "moments": "Second moments",
    "plots": "Figures",
    "rows": "Result rows",
    "subspace": "Solvers",
    "tasks": "Tasks",
}


def names_page() -> str:
    """A section a home, an entry a public name; mkdocstrings fills them from the docstrings."""
    homes: dict[str, list[str]] = {}
    for name in orthomerge.__all__:
        found = getattr(orthomerge, name)
        home = getattr(found, "__module__", f"orthomerge.{name}").split(".")[1]
        homes.setdefault(home, []).append(name)
    parts = [
        "# Python",
        "Every public name, from its docstring; importing orthomerge loads no torch.",
    ]
    for home in sorted(homes, key=lambda h: TITLES.get(h, h)):
        parts.append(f"## {TITLES.get(home, home)}")
        parts += [f"::: orthomerge.{name}" for name in homes[home]]
    return "\n\n".join(parts) + "\n"

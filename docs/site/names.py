"""The reference of the Python names: those of `orthomerge`, then those of its packages."""

from __future__ import annotations

import orthomerge

TITLES = {
    "adapters": "Adapters: read, constrain, convert",
    "diagnostics": "Diagnosis",
    "experiment": "Recipes and runs",
    "factors": "Factors",
    "fisher": "Fisher information",
    "io.rows": "Result rows",
    "merging": "Merging, on factors alone",
    "moments": "Second moments",
    "subspace": "Solvers",
    "tasks": "Tasks",
}


def names_page() -> str:
    """A section per package, an entry per public name; mkdocstrings fills them."""
    parts = [
        "# Python",
        "Every public name, from its docstring; importing orthomerge loads no torch.",
        "## What most users need",
        *(f"::: orthomerge.{name}" for name in orthomerge.__all__),
    ]
    for home, names in sorted(orthomerge.PACKAGES.items(), key=lambda item: TITLES[item[0]]):
        parts.append(f"## {TITLES[home]}: `orthomerge.{home}`")
        parts += [f"::: orthomerge.{home}.{name}" for name in names]
    return "\n\n".join(parts) + "\n"

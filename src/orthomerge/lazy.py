"""Public names of packages, imported when they are first used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def first_use(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose import has to be cheap: names come when they are used.

    They are those that the source of the package imports `if TYPE_CHECKING:`, which says where each
    is and is all that a type checker sees. A name must not be a module's of the package, too:
    Python would give the module once that is imported.
    """
    file = sys.modules[package].__file__
    assert file is not None
    homes = {
        name.asname or name.name: (line.module, name.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module
        for name in line.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module, own = homes[name]
        return getattr(import_module(module), own)

    return get

"""Where a new adapter may live: pure linear algebra on second moments, one solver a file."""

from orthomerge.subspace._types import Subspace
from orthomerge.subspace.registry import Solver, get_solver, list_solvers, register

# Registration happens on import; the order here is the order of `list_solvers`.
# isort: off
from orthomerge.subspace.min_eigen import min_eigen
from orthomerge.subspace.null_space import null_space, null_space_lapack
from orthomerge.subspace.random_orthonormal import random_orthonormal
from orthomerge.subspace.contrastive import contrastive
# isort: on

__all__ = [
    "Solver",
    "Subspace",
    "contrastive",
    "get_solver",
    "list_solvers",
    "min_eigen",
    "null_space",
    "null_space_lapack",
    "random_orthonormal",
    "register",
]

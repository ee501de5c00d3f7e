"""Where a new adapter may live: pure linear algebra on second moments, one solver a file."""

from orthomerge.subspace._types import Cost, Subspace, contrast, describe, orthonormal_rows
from orthomerge.subspace.allocate import allocate_ranks, low_energy_directions
from orthomerge.subspace.dominant import dominant_directions, project_rows_out
from orthomerge.subspace.krylov import smallest
from orthomerge.subspace.registry import Solver, get_solver, list_solvers, register

# Registration happens on import; the order here is the order of `list_solvers`.
# isort: off
from orthomerge.subspace.min_eigen import min_eigen
from orthomerge.subspace.null_space import null_space, null_space_lapack
from orthomerge.subspace.random_orthonormal import random_orthonormal
from orthomerge.subspace.contrastive import contrastive
from orthomerge.subspace.joint import avoid_rows, joint, solve_jointly
# isort: on

__all__ = [
    "Cost",
    "Solver",
    "Subspace",
    "allocate_ranks",
    "avoid_rows",
    "contrast",
    "contrastive",
    "describe",
    "dominant_directions",
    "get_solver",
    "joint",
    "list_solvers",
    "low_energy_directions",
    "min_eigen",
    "null_space",
    "null_space_lapack",
    "orthonormal_rows",
    "project_rows_out",
    "random_orthonormal",
    "register",
    "smallest",
    "solve_jointly",
]

quiet_directions = low_energy_directions  # the name of version 0.1, for one release

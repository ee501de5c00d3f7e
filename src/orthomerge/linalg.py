"""`torch.linalg` as the project uses it, with the types that PyTorch leaves out (`linalg.pyi`)."""

# pyright: basic, reportAttributeAccessIssue=false

from torch.linalg import (
    LinAlgError,
    cholesky,
    cholesky_ex,
    eigh,
    eigvalsh,
    matrix_norm,
    pinv,
    qr,
    solve,
    solve_triangular,
    svd,
    vector_norm,
)

__all__ = [
    "LinAlgError",
    "cholesky",
    "cholesky_ex",
    "eigh",
    "eigvalsh",
    "matrix_norm",
    "pinv",
    "qr",
    "solve",
    "solve_triangular",
    "svd",
    "vector_norm",
]

"""What every representation of a second moment can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import StatisticsError

_M = TypeVar("_M", bound="Moment")


class Moment(ABC):
    """`S = HᵀH / n` of feature rows `H: [n, d_in]`, in some representation.

    The rows come in any number of batches (`update`), moments over different rows add up (`+`), and
    solvers ask for `factor` (`S = RᵀR`, few rows) or, where there is none, for `matrix`. All
    arithmetic is float64: the directions of least energy are differences of large numbers.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int) -> None:
        self._dim: int = dim
        self._count: int = 0
        self._exact: bool = True
        self._slack: float | None = 0.0

    @property
    def dim(self) -> int:
        """Width of a row, d_in."""
        return self._dim

    @property
    def count(self) -> int:
        """Number of rows seen, represented or not."""
        return self._count

    @property
    def exact(self) -> bool:
        """Whether every row seen is represented with nothing left out."""
        return self._exact

    @property
    def slack(self) -> float | None:
        """The most energy of a unit direction that is not represented; None where unknown."""
        return self._slack

    @property
    def matrix(self) -> Float[Tensor, "d_in d_in"]:
        """`S`, dense, float64. O(d_in²) memory; O(k d_in²) of a factor of k rows.

        Raises:
            StatisticsError: no row was seen.
        """
        rows = self._factor()
        return rows.T @ rows

    @property
    def factor(self) -> Float[Tensor, "k d_in"] | None:
        """Rows `R` with `S = RᵀR`, float64; None where only the matrix is held."""
        return None

    @property
    def gram(self) -> Float[Tensor, "k k"] | None:
        """`R Rᵀ` of the factor; None where only the matrix is held. O(k² d_in)."""
        rows = self.factor
        return None if rows is None else rows @ rows.T

    def eigh(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        """Eigenvalues of `S`, ascending, and eigenvectors as columns. O(d_in³)."""
        values, vectors = linalg.eigh(self.matrix)
        return values, vectors

    @property
    def trace(self) -> float:
        """`tr(S)`, the mean squared norm of a row."""
        return float(self._factor().square().sum())

    def apply(self, columns: Float[Tensor, "d_in m"]) -> Float[Tensor, "d_in m"]:
        """`S X = Rᵀ (R X)`: `S` is not formed where a factor is held. O(k d_in m)."""
        rows = self._factor()
        return rows.T @ (rows @ columns.double())

    def _factor(self) -> Tensor:
        """The factor, by a kind that always holds one; any other overrides what is made of it."""
        rows = self.factor
        assert rows is not None
        return rows

    def quadratic(self, basis: Float[Tensor, "r d_in"]) -> Float[Tensor, "r r"]:
        """`A S Aᵀ`, float64."""
        wide = basis.double()
        return wide @ self.apply(wide.T)

    def energies(self, basis: Float[Tensor, "r d_in"]) -> Float[Tensor, " r"]:
        """The energy `a_k S a_kᵀ` along each row, float64."""
        wide, factor = basis.double(), self.factor
        if factor is not None:
            return (wide @ factor.T).square().sum(dim=1)
        return (wide * self.apply(wide.T).T).sum(dim=1)

    def update(self: _M, rows: Float[Tensor, "n d_in"], draw: int | None = None) -> _M:
        """Add rows; returns self. `draw` seeds a representation that samples; others ignore it.

        Raises:
            StatisticsError: rows of another width, or rows with NaN or infinity; nothing is added.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise StatisticsError(
                f"feature rows {list(rows.shape)} do not fit a moment of width {self.dim}: "
                "pass rows [n, d_in] of one layer."
            )
        rows = rows.detach()
        refuse_not_finite(rows)
        self._add_rows(rows, draw)
        return self

    @abstractmethod
    def _add_rows(self, rows: Tensor, draw: int | None) -> None:
        """Add rows that fit and are finite."""

    def add_zeros(self: _M, count: int) -> _M:
        """Count rows that are zero, as of tokens that did not reach an expert; returns self."""
        self._count += count
        return self

    @abstractmethod
    def __add__(self, other: Moment) -> Moment:
        """The moment over both sets of rows.

        Raises:
            StatisticsError: moments of different widths.
        """

    def __sub__(self, other: Moment) -> Moment:
        """The moment without rows that are in it.

        Raises:
            StatisticsError: a representation that cannot be taken apart exactly.
        """
        raise StatisticsError(
            f"a moment of kind '{self.kind}' cannot be taken apart exactly: collect it with "
            "representation 'full', or combine the other tasks' moments instead."
        )

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` makes an equal moment of."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Moment:
        """The moment that `state` described.

        Raises:
            StatisticsError: a state that no moment has: shapes, signs, NaN.
        """

    def to(self, device: torch.device | str) -> Moment:
        """The same moment with its tensors on `device`; itself where they are there already."""
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        if all(tensor.device == torch.device(device) for tensor in held):
            return self
        tensors, fields = self.state()
        return type(self).restore({k: v.to(device) for k, v in tensors.items()}, fields)

    def _check_width(self, other: Moment) -> None:
        if other.dim != self.dim:
            raise StatisticsError(f"moments of width {self.dim} and {other.dim} do not add up.")

    def _require_rows(self) -> None:
        if not self.count:
            raise StatisticsError("no feature row was seen: the sample is empty or all padding.")


def not_finite(bad: int, of: int) -> StatisticsError:
    """The error for rows with NaN or infinity."""
    return StatisticsError(
        f"{bad} of {of} feature rows hold NaN or infinity: run the model in float32 or bfloat16, "
        "or drop the samples that overflow."
    )


def refuse_not_finite(rows: Tensor) -> None:
    """Raise for rows with NaN or infinity, saying how many."""
    # The sum is not finite where an entry is not, and reads the rows once; it can overflow too.
    if bool(torch.isfinite(rows.sum(dtype=torch.float32))):
        return
    bad = int((~torch.isfinite(rows).all(dim=1)).sum())
    if bad:
        raise not_finite(bad, rows.shape[0])


def mixed_granularity() -> StatisticsError:
    """The error for adding a task mean to another granularity."""
    return StatisticsError(
        "a task mean and statistics of another granularity do not add up: collect both "
        "with one --granularity."
    )


def slack_of(fields: Mapping[str, Any]) -> float | None:
    """The slack that a stored state names.

    Raises:
        StatisticsError: one that no moment has.
    """
    found = fields.get("slack", 0.0)
    slack = None if found is None else float(found)
    if slack is not None and not 0 <= slack < float("inf"):
        raise StatisticsError(f"a moment leaves out no energy of {slack}: collect it again.")
    return slack


def weighted_slack(moments: Sequence[Moment], shares: Sequence[float]) -> float | None:
    """`Σ share · slack`; None where one of them is unknown."""
    slacks = [m.slack for m in moments]
    known = [s for s in slacks if s is not None]
    if len(known) < len(slacks):
        return None
    return sum(share * slack for share, slack in zip(shares, known, strict=True))


def as_moment(value: Moment | Tensor) -> Moment:
    """A moment as it is, or one around a square matrix `S`.

    Raises:
        StatisticsError: a tensor that is not square.
    """
    if isinstance(value, Moment):
        return value
    from orthomerge.moments.full import SecondMoment

    if value.ndim != 2 or value.shape[0] != value.shape[1]:
        raise StatisticsError(
            f"a second moment is square [d_in, d_in], this one is {list(value.shape)}: "
            "pass H.T @ H / n, or RowMoment.from_rows(H) for the rows H."
        )
    return SecondMoment.from_matrix(value, 1)

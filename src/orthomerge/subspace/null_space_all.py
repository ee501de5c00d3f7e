"""`null_space` for every task at once: what the tasks share is computed once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.moments import Moment
from orthomerge.moments.moment import weighted_slack
from orthomerge.subspace._types import (
    Cost,
    Subspace,
    gaussian_rows,
    orthonormal_rows,
    reached_of,
    solve_rows,
)
from orthomerge.subspace.registry import together
from orthomerge.subspace.row_space import independent

# Rounds of taking the features off; one more than a well-conditioned problem ever needs.
_ROUNDS = 4


@together("null_space")
def null_space_of_all(
    moments: Sequence[Moment],
    ranks: Sequence[int],
    *,
    seeds: Sequence[int],
    weights: Sequence[float],
    tie: str = "random",
    tolerance: float = 1e-10,
) -> list[Subspace] | None:
    """The rows `null_space` chooses for each task against all others; None where it must go alone.

    One Gram matrix of all features, one Cholesky factor a task, and products with all features for
    the rows of all tasks at once: where one task after another reads them a dozen times, they are
    read a few times for all. O((Σ k)² d_in + T (Σ k)³ / 3 + T rank (Σ k) d_in).
    """
    began = time.perf_counter()
    stack = _Stack.of(moments)
    if stack is None or tie not in ("random", "own") or min(weights) <= 0:
        return None
    factors = [independent(stack.part(t), tolerance) for t in range(len(moments))]
    lowers = [lower for lower in factors if lower is not None]
    if len(lowers) < len(moments) or any(
        stack.dim - len(lower) < rank for lower, rank in zip(lowers, ranks, strict=True)
    ):
        return None
    if tie == "random":
        drawn = [
            gaussian_rows(rank, stack.dim, seed, stack.rows)
            for rank, seed in zip(ranks, seeds, strict=True)
        ]
        rows = stack.silence(torch.cat(drawn), ranks, lowers)
    else:
        loudest = stack.loudest(moments, ranks, lowers)
        if loudest is None:
            return None
        rows = loudest
    for _ in range(_ROUNDS):
        rows = _orthonormal(stack.silence(rows, ranks, lowers), ranks)
        energies = (rows @ stack.rows.T).square()
        found = stack.describe(rows, energies, moments, ranks, weights)
        if all(s.captured_other <= tolerance * s.total_other for s in found):
            seconds = (time.perf_counter() - began) / len(moments)
            return [s._replace(cost=Cost(seconds, "gram of all tasks")) for s in found]
    return None


def _orthonormal(rows: Tensor, ranks: Sequence[int]) -> Tensor:
    parts = cast(Sequence[Tensor], rows.split(list(ranks)))
    return torch.cat([orthonormal_rows(part) for part in parts])


class _Stack:
    """The factors of all tasks' moments, one below the other, with their Gram matrix."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.rows = torch.cat(list(factors))
        self.dim = self.rows.shape[1]
        self._gram = self.rows @ self.rows.T
        owner = [torch.full((f.shape[0],), t) for t, f in enumerate(factors)]
        self._owner = torch.cat(owner).to(self.rows.device)
        self._others = [(self._owner != t).nonzero()[:, 0] for t in range(len(factors))]
        self._mine = [(self._owner == t).nonzero()[:, 0] for t in range(len(factors))]

    @classmethod
    def of(cls, moments: Sequence[Moment]) -> _Stack | None:
        """None where a moment holds a matrix, or all rows together are no fewer than dimensions."""
        factors = [m.factor for m in moments]
        held = [f for f in factors if f is not None]
        if len(held) < len(moments) or sum(len(f) for f in held) >= held[0].shape[1]:
            return None
        return cls(held)

    def part(self, task: int) -> Float[Tensor, "k k"]:
        """The Gram matrix of the others' rows."""
        others = self._others[task]
        return self._gram[others][:, others]

    def silence(
        self, rows: Float[Tensor, "all d_in"], ranks: Sequence[int], lowers: Sequence[Tensor]
    ) -> Float[Tensor, "all d_in"]:
        """Each task's rows without what the others' features reach."""
        seen = rows @ self.rows.T
        taken = torch.zeros_like(seen)
        start = 0
        for others, rank, lower in zip(self._others, ranks, lowers, strict=True):
            mine = slice(start, start + rank)
            taken[mine, others] = solve_rows(lower, seen[mine][:, others])
            start += rank
        return rows - taken @ self.rows

    def loudest(
        self, moments: Sequence[Moment], ranks: Sequence[int], lowers: Sequence[Tensor]
    ) -> Float[Tensor, "all d_in"] | None:
        """Each task's rows of most own energy outside the others' features; None if too few.

        By the Schur complement of the others in the Gram matrix, as small as the own rows are few.
        """
        weights = torch.zeros(sum(ranks), len(self.rows), dtype=self.rows.dtype)
        weights = weights.to(self.rows.device)
        start = 0
        for t, (rank, lower) in enumerate(zip(ranks, lowers, strict=True)):
            others, mine = self._others[t], self._mine[t]
            cross = self._gram[mine][:, others]
            removed = solve_rows(lower, cross)
            left = self._gram[mine][:, mine] - removed @ cross.T
            values, vectors = linalg.eigh((left + left.T) / 2)
            if reached_of(values[-rank:], moments[t].trace) < rank:
                return None
            top = vectors[:, -rank:].flip(1).T / values[-rank:].flip(0).sqrt()[:, None]
            place = torch.arange(start, start + rank, device=weights.device)
            weights[place[:, None], mine] = top
            weights[place[:, None], others] = -(top @ removed)
            start += rank
        return weights @ self.rows

    def describe(
        self,
        rows: Tensor,
        energies: Float[Tensor, "all k"],
        moments: Sequence[Moment],
        ranks: Sequence[int],
        weights: Sequence[float],
    ) -> list[Subspace]:
        """What each task's rows see, from their products with all features."""
        by_task = torch.zeros(len(rows), len(moments), dtype=energies.dtype, device=rows.device)
        by_task.index_add_(1, self._owner, energies)
        shares = torch.tensor(weights, dtype=energies.dtype, device=rows.device)
        traces = torch.zeros_like(shares).index_add_(0, self._owner, torch.diagonal(self._gram))
        found: list[Subspace] = []
        bases = cast(Sequence[Tensor], rows.split(list(ranks)))
        energies_seen = cast(Sequence[Tensor], by_task.split(list(ranks)))
        for t, (basis, seen) in enumerate(zip(bases, energies_seen, strict=True)):
            left = shares.clone()
            left[t] = 0.0
            left /= left.sum()
            others = [u for u in range(len(moments)) if u != t]
            values = seen @ left
            found.append(
                Subspace(
                    basis=basis,
                    eigenvalues=values,
                    captured_other=float(values.sum()),
                    captured_own=float(seen[:, t].sum()),
                    total_other=float(traces @ left),
                    total_own=float(traces[t]),
                    admissible=self.dim - len(self._others[t]),
                    slack=weighted_slack(
                        [moments[u] for u in others], [float(left[u]) for u in others]
                    ),
                    cost=Cost(0.0, ""),
                )
            )
        return found

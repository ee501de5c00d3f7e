"""`joint`: away from the others' features and from the other adapters' rows (beyond the paper)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment, RowMoment, SecondMoment, leave_one_out
from orthomerge.subspace._types import Cost, Subspace, check_problem, describe
from orthomerge.subspace.contrastive import contrastive, contrastive_rows, mean_energy
from orthomerge.subspace.registry import register, together

# The part of `overlap` that the first of many sweeps asks for.
_GENTLE = 1e-3


@register(
    "joint",
    title="contrastive, and away from the rows that the other adapters hold",
    paper="ours",
    needs_own=True,
    joint=True,
)
def joint(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
    taken: Float[Tensor, "m d_in"] | None = None,
    balance: float = 0.01,
    overlap: float = 10.0,
) -> Subspace:
    """One task against others that exist: their statistics **and** the rows `taken` by their `A`.

    `contrastive` on `S_other + overlap · ē · P`, where `P = AᵀA` sums over the rows of the other
    adapters made unit and `ē` is the others' mean energy: a direction another adapter reads counts
    as dominant. The ridge stays that of `S_other`: else a large `overlap` would drown the features
    it is added to, and as it is, `overlap` to infinity is `contrastive` outside the taken rows.
    Without `taken` it is `contrastive`. The others stay as they are, so a tenth task is added to
    nine without touching them.

    Raises:
        SubspaceError: what `contrastive` refuses, a negative `overlap`, or rows of another width.
    """
    if overlap < 0:
        raise SubspaceError(f"overlap must not be negative, not {overlap}: 10 is the default.")
    if taken is None or own is None or not balance > 0:  # or let `contrastive` refuse
        return contrastive(other, rank, own=own, seed=seed, balance=balance)
    avoided = avoid_rows(other, taken, overlap)
    basis, how = contrastive_rows(avoided, own, rank, seed, balance * mean_energy(other))
    return describe(basis, other, own, other.dim, how)


def avoid_rows(other: Moment, taken: Float[Tensor, "m d_in"], overlap: float) -> Moment:
    """`S_other + overlap · ē · AᵀA`, the rows of A made unit, in the form `other` has.

    Raises:
        SubspaceError: rows of another width, or with NaN or infinity.
    """
    if not bool(taken.isfinite().all()):
        raise SubspaceError("rows of other adapters hold NaN or infinity: train them again.")
    if taken.ndim != 2 or taken.shape[1] != other.dim:
        raise SubspaceError(
            f"rows {list(taken.shape)} of other adapters do not fit a layer with {other.dim} "
            "inputs: they belong to another layer or model."
        )
    rows = taken.double()
    norms = linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    rows = rows * (overlap * mean_energy(other)) ** 0.5
    factor = other.factor
    if factor is not None and factor.shape[0] + rows.shape[0] < other.dim:
        stacked = torch.cat([factor, rows.to(factor.device)])
        return RowMoment.from_factor(stacked, other.count, exact=other.exact, slack=other.slack)
    matrix = other.matrix
    rows = rows.to(matrix.device)
    return SecondMoment.from_matrix(
        matrix + rows.T @ rows, other.count, exact=other.exact, slack=other.slack
    )


@together("joint")
def solve_jointly(
    moments: Sequence[Moment],
    ranks: Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    taken: Float[Tensor, "m d_in"] | None = None,
    balance: float = 0.01,
    overlap: float = 10.0,
    sweeps: int = 4,
) -> list[Subspace]:
    """Every task at once: each `A_t` away from the others' features and from the other `A_u`.

    Every task first chooses alone (`contrastive`). Then block coordinate descent: sweeps over the
    tasks, each solved against the rows that the others hold at that moment (`joint`), while
    `overlap` rises from a thousandth to what it is. So all give way a little at a time, where at
    full overlap from the start the first would keep what it has and the last get what is left.
    The order makes a small difference; callers that must agree sort the tasks in the same way.
    `taken` are rows of adapters outside the set. O(sweeps · T) solutions.

    Raises:
        SubspaceError: what `joint` refuses, or not one rank and one seed per task.
    """
    others = leave_one_out(moments, weights)
    seeds = list(range(len(moments))) if seeds is None else list(seeds)
    if not len(ranks) == len(seeds) == len(moments):
        raise SubspaceError(
            f"{len(moments)} tasks have {len(ranks)} ranks and {len(seeds)} seeds: give one "
            "per task."
        )
    for other, own, rank in zip(others, moments, ranks, strict=True):
        check_problem(other, rank, own)
    seconds = [0.0] * len(moments)

    def solve(t: int, rows: list[Tensor], strength: float) -> Subspace:
        began = time.perf_counter()
        held = torch.cat(rows) if rows else None
        found = joint(
            others[t], ranks[t], own=moments[t], seed=seeds[t],
            taken=held, balance=balance, overlap=strength,
        )  # fmt: skip
        seconds[t] += time.perf_counter() - began
        return found._replace(cost=Cost(seconds[t], found.cost.how))

    outside = [] if taken is None else [taken]
    found = [solve(t, outside, overlap) for t in range(len(moments))]
    for sweep in range(sweeps):
        strength = overlap * _GENTLE ** (1.0 - (sweep + 1) / sweeps)
        for t in range(len(moments)):
            rows = [s.basis for u, s in enumerate(found) if u != t]
            found[t] = solve(t, rows + outside, strength)
    return found

"""`joint`: away from the others' features and from the other adapters' rows (beyond the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment, RowMoment, SecondMoment, leave_one_out
from orthomerge.subspace._types import Subspace, check_problem, describe
from orthomerge.subspace.contrastive import contrastive
from orthomerge.subspace.registry import register


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
    as loud. Without `taken` it is `contrastive`. The others stay as they are, so a tenth task is
    added to nine without touching them.

    Raises:
        SubspaceError: what `contrastive` refuses, a negative `overlap`, or rows of another width.
    """
    if overlap < 0:
        raise SubspaceError(f"overlap must not be negative, not {overlap}: 10 is the default.")
    avoided = other if taken is None else avoid_rows(other, taken, overlap)
    found = contrastive(avoided, rank, own=own, seed=seed, balance=balance)
    return describe(found.basis, other, own, found.admissible, found.cost.how)


def avoid_rows(other: Moment, taken: Float[Tensor, "m d_in"], overlap: float) -> Moment:
    """`S_other + overlap · ē · AᵀA`, the rows of A made unit, in the form `other` has.

    Raises:
        SubspaceError: rows of another width.
    """
    if taken.ndim != 2 or taken.shape[1] != other.dim:
        raise SubspaceError(
            f"rows {list(taken.shape)} of other adapters do not fit a layer with {other.dim} "
            "inputs: they belong to another layer or model."
        )
    rows = taken.double()
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    rows = rows * (overlap * other.trace / other.dim) ** 0.5
    factor = other.factor
    if factor is not None and factor.shape[0] + rows.shape[0] < other.dim:
        stacked = torch.cat([factor, rows.to(factor.device)])
        return RowMoment.from_factor(stacked, other.count, slack=other.slack)
    matrix = other.matrix
    rows = rows.to(matrix.device)
    return SecondMoment.from_matrix(matrix + rows.T @ rows, other.count)


def solve_jointly(
    moments: Sequence[Moment],
    ranks: Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    taken: Float[Tensor, "m d_in"] | None = None,
    balance: float = 0.01,
    overlap: float = 10.0,
    sweeps: int = 3,
) -> list[Subspace]:
    """Every task at once: each `A_t` away from the others' features and from the other `A_u`.

    Block coordinate descent: sweeps over the tasks in the order given, each solved against the
    rows that the others hold at that moment (`joint`). Which order that is makes a small
    difference, so callers that must agree sort the tasks alike. `taken` are rows of adapters
    outside the set. O(sweeps · T) solutions.

    Raises:
        SubspaceError: what `joint` refuses.
    """
    others = leave_one_out(moments, weights)
    seeds = list(range(len(moments))) if seeds is None else list(seeds)
    for other, own, rank in zip(others, moments, ranks, strict=True):
        check_problem(other, rank, own)
    found: list[Subspace | None] = [None] * len(moments)
    for _ in range(max(sweeps, 1)):
        for t, (other, own) in enumerate(zip(others, moments, strict=True)):
            rows = [s.basis for u, s in enumerate(found) if u != t and s is not None]
            rows += [taken] if taken is not None else []
            found[t] = joint(
                other,
                ranks[t],
                own=own,
                seed=seeds[t],
                taken=torch.cat(rows) if rows else None,
                balance=balance,
                overlap=overlap,
            )
    return [s for s in found if s is not None]

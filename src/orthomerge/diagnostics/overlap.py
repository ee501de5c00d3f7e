"""How adapters lie to each other, from their factors alone: no data, no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.adapters import Adapter
from orthomerge.diagnostics.couplings import read_all, stacked, sum_blocks
from orthomerge.factors import LoraFactors

ALIKE = 0.5
"""Mean cosine of rows of A from which two starts count as one; rows drawn apart have ~1/√d_in."""
SIGN_ROWS = 256
"""Rows of ΔW, evenly spaced, that a layer's sign conflict is estimated from."""


class LayerOverlap(NamedTuple):
    """One layer's comparison of every two adapters; 0 where one of them leaves the layer alone.

    `products = ⟨ΔW_i, ΔW_j⟩_F`. `row_space` and `column_space` hold the mean squared cosine of the
    principal angles between the spaces of A's rows and of B's columns: 1 where the smaller is in
    the larger, r/d for spaces drawn at random. `opposed` and `weighed` are `Σ |ΔW_i ΔW_j|` over the
    entries of opposite signs and over all. `start_alike` is the mean cosine of A's rows, each with
    the row of the same place. `effective_rank = exp(-Σ p log p)` of the singular values' shares p
    (Roy & Vetterli, 2007).
    """

    products: Float[Tensor, "adapters adapters"]
    row_space: Float[Tensor, "adapters adapters"]
    column_space: Float[Tensor, "adapters adapters"]
    opposed: Float[Tensor, "adapters adapters"]
    weighed: Float[Tensor, "adapters adapters"]
    start_alike: Float[Tensor, "adapters adapters"]
    effective_rank: Float[Tensor, " adapters"]
    here: Float[Tensor, " adapters"]


class Overlap(NamedTuple):
    """The comparison over all layers, and each layer's.

    `cosine` is of the whole updates; `sign_conflict` the share of `Σ |ΔW_i ΔW_j|` that is on
    entries of opposite signs (0.5 for updates that have nothing to do with each other); spaces,
    starts and ranks are means over the layers that both (or the one) adapt. `norms` are `‖ΔW‖_F`.
    """

    names: list[str]
    cosine: Float[Tensor, "adapters adapters"]
    row_space: Float[Tensor, "adapters adapters"]
    column_space: Float[Tensor, "adapters adapters"]
    sign_conflict: Float[Tensor, "adapters adapters"]
    start_alike: Float[Tensor, "adapters adapters"]
    norms: Float[Tensor, " adapters"]
    effective_rank: Float[Tensor, " adapters"]
    layers: dict[str, LayerOverlap]

    @property
    def shared_starts(self) -> list[tuple[int, int]]:
        """Pairs of adapters whose A began as one: drawn under one seed, or copied."""
        alike = torch.triu(self.start_alike > ALIKE, diagonal=1)
        return [(int(i), int(j)) for i, j in alike.nonzero()]


def overlap(adapters: Sequence[str | Path | Adapter]) -> Overlap:
    """Every two adapters compared layer by layer.

    All but the sign conflict comes from `A Aᵀ` and `Bᵀ B` of the stacked factors, O((Nr)² d) a
    layer in float64; signs from at most 256 rows of each update, O(N r d_in) a row.

    Raises:
        AdapterError: unreadable adapters, or adapters of different base models.
    """
    read = read_all(adapters)
    size = len(read)
    layers: dict[str, LayerOverlap] = {}
    for layer in sorted({name for a in read for name in a.layers}):
        held = {i: a.layers[layer] for i, a in enumerate(read) if layer in a.layers}
        layers[layer] = _layer(held, size)
    found = list(layers.values())
    products = sum((f.products for f in found), torch.zeros(size, size, dtype=torch.float64))
    norms = products.diagonal().clamp(min=0).sqrt()
    opposed, weighed = sum(f.opposed for f in found), sum(f.weighed for f in found)
    both = sum(torch.outer(f.here, f.here) for f in found)
    ranks = sum(f.effective_rank for f in found)
    return Overlap(
        [a.name for a in read],
        _ratio(products, torch.outer(norms, norms)),
        _ratio(sum(f.row_space for f in found), both),
        _ratio(sum(f.column_space for f in found), both),
        _ratio(opposed, weighed),
        _ratio(sum(f.start_alike for f in found), both),
        norms,
        _ratio(ranks, sum(f.here for f in found)),
        layers,
    )


def _layer(held: dict[int, LoraFactors], size: int) -> LayerOverlap:
    A, B, owner = stacked(list(held.values()))
    of = torch.tensor(list(held))[owner]
    rows, columns = A @ A.T, B.T @ B
    places = {i: (of == i).nonzero()[:, 0] for i in held}
    square = torch.zeros(5, size, size, dtype=torch.float64)
    ranks, here = torch.zeros(2, size, dtype=torch.float64).unbind()
    for i, p in places.items():
        here[i] = 1.0
        ranks[i] = _effective_rank(rows[p][:, p], columns[p][:, p])
        for j, q in places.items():
            square[0, i, j] = _principal(rows, p, q)
            square[1, i, j] = _principal(columns, p, q)
            square[4, i, j] = _row_by_row(rows, p, q)
    square[2:4] = _signs(held, size)
    return LayerOverlap(
        sum_blocks(rows * columns, of, size), square[0], square[1], square[2], square[3],
        square[4], ranks, here,
    )  # fmt: skip


def _principal(gram: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The mean squared cosine of the principal angles between two spans, from their Gram matrix."""
    left, right = _whiten(gram[p][:, p]), _whiten(gram[q][:, q])
    least = min(len(left), len(right))
    if not least:
        return gram.new_zeros(())
    return (left @ gram[p][:, q] @ right.T).square().sum() / least


def _whiten(gram: Float[Tensor, "r r"]) -> Float[Tensor, "k r"]:
    """`W` with `W G Wᵀ = I` on the directions that the vectors span."""
    values, V = linalg.eigh(gram)
    span = values > values[-1] * len(values) * torch.finfo(gram.dtype).eps * 16
    span &= values > 0
    return (V[:, span] / values[span].sqrt()).T


def _row_by_row(gram: Tensor, p: Tensor, q: Tensor) -> Tensor:
    count = min(len(p), len(q))
    dots, norms = gram[p[:count], q[:count]], gram.diagonal().sqrt()
    return _ratio(dots, norms[p[:count]] * norms[q[:count]]).mean()


def _effective_rank(rows: Float[Tensor, "r r"], columns: Float[Tensor, "r r"]) -> Tensor:
    """Of `B A`, whose singular values are the roots of the eigenvalues of `R^½ C R^½`."""
    values, V = linalg.eigh(rows)
    root = (V * values.clamp(min=0).sqrt()) @ V.T
    singular = linalg.eigvalsh(root @ columns @ root).clamp(min=0).sqrt()
    total = singular.sum()
    if not total:
        return total
    shares = singular / total
    return cast(Tensor, torch.special.entr(shares)).sum().exp()


def _signs(held: dict[int, LoraFactors], size: int) -> Float[Tensor, "two size size"]:
    """`Σ |ΔW_i ΔW_j|` over entries of opposite signs, and over all, on evenly spaced rows."""
    height = next(iter(held.values())).shape[0]
    picked = torch.linspace(0, height - 1, min(SIGN_ROWS, height)).round().long()
    dense = {i: f.scaling * (f.B[picked].double() @ f.A.double()) for i, f in held.items()}
    found = torch.zeros(2, size, size, dtype=torch.float64)
    for i, mine in dense.items():
        for j, other in dense.items():
            if j < i:
                continue
            product = mine * other
            weighed = product.abs().sum()
            opposed = (weighed - product.sum()) / 2
            found[:, i, j] = found[:, j, i] = torch.stack([opposed, weighed])
    return found


def _ratio(value: Tensor | int, by: Tensor | int) -> Tensor:
    """`value / by`, 0 where `by` is 0."""
    value, by = torch.as_tensor(value), torch.as_tensor(by)
    return torch.where(by > 0, value / torch.where(by > 0, by, 1.0), 0.0)

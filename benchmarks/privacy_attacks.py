"""Attacks on a statistics file by a reader who has the model and other texts of the same kind.

Membership, from the rows `H` of a candidate text, summed over layers; higher says "was in it":

- `residual`: −log of the share of the rows' energy outside the directions of the file. Members of
  a file of fewer rows than dimensions have none.
- `leverage`: −log of the mean `hᵀ (n S)⁻¹ h`, which no row that is in `S` brings above 1.
- `calibrated`: the same against the reader's own texts, which takes off that some texts are odd.
- `tracing`: `Σ gᵀ Δ g / ‖G Gᵀ‖` with `g = W h`, `Δ = W (S − S_ref) W`, `W = (S_ref + ε)^-1/2`: the
  likelihood ratio of a small change of a mean (as Homer et al. 2008 and Dwork et al. 2015 trace
  rows in means), here of products of features.

Words, from the input of the first layer: every (word, position) has one known row `c` there, so the
reader ranks all of the vocabulary by `min over positions cᵀ (n S)⁻¹ c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.privacy_features import Texts, View, view
from orthomerge.moments import MeanMoment, Moment, SecondMoment

ATTACKS = ("residual", "leverage", "calibrated", "tracing")


class Reference(NamedTuple):
    """What the reader knows beforehand of one layer, from texts of its own."""

    view: View
    moment: Tensor
    whitener: Tensor
    mean: Tensor


def reference(texts: Texts) -> list[Reference]:
    """The reader's own statistics, one a layer."""
    found = []
    for rows in texts.rows:
        moment = SecondMoment(rows.shape[1]).update(rows)
        values, vectors = torch.linalg.eigh(moment.matrix)
        ridge = 1e-3 * float(values.mean())
        whitener = (vectors / (values.clamp_min(0) + ridge).sqrt()) @ vectors.T
        mean = rows.double().mean(0)
        found.append(Reference(view(moment), moment.matrix.float(), whitener.float(), mean.float()))
    return found


def leverage(rows: Tensor, seen: View) -> tuple[Tensor, Tensor]:
    """`hᵀ (n S)⁻¹ h` of every row, and the energy it has outside the file's directions."""
    along = rows @ seen.vectors
    inside = (along.square() / seen.values).sum(1)
    if seen.vectors.shape[1] < rows.shape[1]:
        outside = (rows - along @ seen.vectors.T).square().sum(1)
    else:
        outside = rows.new_zeros(len(rows))
    return (inside + outside / seen.floor) / seen.count, outside


def member_scores(
    candidates: Texts, file: Sequence[Moment], known: Sequence[Reference]
) -> dict[str, Tensor]:
    """Every attack's score of every candidate text."""
    if isinstance(file[0], MeanMoment):
        return {"tracing": _mean_scores(candidates, file, known)}
    scores = {name: torch.zeros(len(candidates), dtype=torch.float64) for name in ATTACKS}
    for rows, moment, ref in zip(candidates.rows, file, known, strict=True):
        seen = view(moment)
        here, outside = leverage(rows, seen)
        here = candidates.per_text(here, mean=True).double().clamp_min(1e-12).log()
        usual = candidates.per_text(leverage(rows, ref.view)[0], mean=True).double().log()
        share = candidates.per_text(outside) / candidates.per_text(rows.square().sum(1))
        scores["residual"] -= share.double().clamp_min(1e-12).log()
        scores["leverage"] -= here
        scores["calibrated"] += usual - here
        scores["tracing"] += _traced(candidates, rows, seen, ref)
    return scores


def _traced(candidates: Texts, rows: Tensor, seen: View, ref: Reference) -> Tensor:
    """How far the file lies from the reader's own texts in the direction of each candidate."""
    vectors = seen.vectors
    change = (vectors * seen.values) @ vectors.T
    if vectors.shape[1] < rows.shape[1]:  # only what the file tells of is compared
        own = vectors.T @ ref.moment @ vectors
        change = change - vectors @ own @ vectors.T
    else:
        change = change - ref.moment
    white = rows @ ref.whitener
    turned = white @ (ref.whitener @ change @ ref.whitener)
    moved = candidates.per_text((turned * white).sum(1))
    size = torch.stack(
        [
            (white[a:b] @ white[a:b].T).norm()
            for a, b in zip(candidates.start[:-1], candidates.start[1:], strict=True)
        ]
    )
    return (moved / size).double()


def _mean_scores(candidates: Texts, file: Sequence[Moment], known: Sequence[Reference]) -> Tensor:
    """Of a file that tells one vector a layer: the cosine of what candidate and file add."""
    score = torch.zeros(len(candidates), dtype=torch.float64)
    for rows, moment, ref in zip(candidates.means().rows, file, known, strict=True):
        told = moment.factor
        assert told is not None
        one = told[0].float()
        away, own = (one - ref.mean) @ ref.whitener, (rows - ref.mean) @ ref.whitener
        score += torch.cosine_similarity(own, away[None], dim=1).double()
    return score


class Dictionary:
    """The input of the first layer for every word of the vocabulary at a position."""

    def __init__(self, model: nn.Module, positions: int = 24) -> None:
        self._parts = model.embeddings
        self.positions = positions

    def at(self, position: int) -> Tensor:
        """Rows [vocabulary, d]: word, position and type summed and normalised as BERT does."""
        parts = self._parts
        with torch.no_grad():
            fixed = parts.position_embeddings.weight[position]
            fixed = fixed + parts.token_type_embeddings.weight[0]
            return parts.LayerNorm(parts.word_embeddings.weight + fixed)

    def leverages(self, moment: Moment) -> Tensor:
        """`cᵀ (n S)⁻¹ c` [positions, vocabulary], from position 1: 0 is the mark of the start."""
        seen = view(moment)
        return torch.stack([leverage(self.at(p), seen)[0] for p in range(1, self.positions + 1)])


class Words(NamedTuple):
    """How well the vocabulary was ranked.

    `found` is the precision, and as well the recall, among as many words as there are; `rare` the
    same among words that the reader's own texts do not have; `prior` is what guessing by frequency
    in those texts finds.
    """

    found: float
    rare: float
    prior: float


def words(leverages: Tensor, members: Texts, known: Texts, special: set[int]) -> Words:
    """The attack's ranking against the words that are really there."""
    size = leverages.shape[1]
    usable = torch.ones(size, dtype=torch.bool)
    usable[list(special)] = False
    there = _counts(members, size).bool() & usable
    prior = _counts(known, size)
    new = usable & (prior == 0)
    score = -leverages.min(0).values
    return Words(
        _top(score, there, usable),
        _top(score, there & new, new),
        _top(prior + torch.rand(size) * 0.5, there, usable),
    )


def _counts(texts: Texts, size: int) -> Tensor:
    flat = torch.tensor([i for ids in texts.ids for i in ids])
    return torch.bincount(flat, minlength=size).float()


def _top(score: Tensor, there: Tensor, among: Tensor) -> float:
    wanted = int(there.sum())
    if not wanted:
        return float("nan")
    best = score.masked_fill(~among, -torch.inf).topk(wanted).indices
    return float(there[best].float().mean())


def verbatim(leverages: Tensor, ids: Sequence[int]) -> float:
    """The share of its words read off in their places, where a text is alone in the file."""
    inner = ids[1:-1][: leverages.shape[0]]
    guessed = leverages[: len(inner)].argmin(1).tolist()
    return sum(a == b for a, b in zip(guessed, inner, strict=True)) / max(len(inner), 1)

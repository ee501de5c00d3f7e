"""The elementwise family as a table: every method a sparsifier × a consensus × a space."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orthomerge.factors import LoraFactors
from orthomerge.merging.compose import CONSENSUS, RANDOM, SPARSIFIERS, compose
from orthomerge.merging.registry import DefaultWeight, Update, register


@dataclass(frozen=True)
class Row:
    """One method of the family.

    `space` is None where it is an option of the method ("delta" by default). The other options are
    those that the sparsifier and the consensus read, and `lambda_`; `defaults` are the values in
    which they differ from `compose`'s. `formula` and `about` are what its documentation says.
    """

    name: str
    title: str
    summary: str
    sparsifier: str
    consensus: str
    paper: str
    url: str
    formula: str
    about: str = ""
    space: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return self.sparsifier in RANDOM

    @property
    def cost(self) -> str:
        """The cost of one layer."""
        if self.space == "knots":
            return "O(d_out R² + N d_in R²), R = Σ r_i"
        return "O(N d_out d_in log d_in)" if self.sparsifier == "magprune" else "O(N d_out d_in)"

    @property
    def options(self) -> dict[str, Any]:
        """The options with their defaults."""
        shared = inspect.signature(compose).parameters
        names = (*SPARSIFIERS[self.sparsifier], *CONSENSUS[self.consensus], "lambda_")
        values = {name: self.defaults.get(name, shared[name].default) for name in names}
        return values if self.space else {**values, "space": "delta"}


class RowMethod:
    """The merge function of a row: `compose` with the row's choices made."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.__name__ = row.name
        self.__doc__ = _documentation(row)
        kinds = inspect.Parameter
        given = ("generator",) if row.random else ()
        self.__signature__ = inspect.Signature(
            [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("factors", "weights")]
            + [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in given]
            + [kinds(k, kinds.KEYWORD_ONLY, default=v) for k, v in row.options.items()]
        )

    def __call__(
        self, factors: Sequence[LoraFactors], weights: Sequence[float], **options: Any
    ) -> Update:
        """One layer; the options are those of the row."""
        bound = self.__signature__.bind(factors, weights, **options)
        chosen: dict[str, Any] = {
            "sparsifier": self.row.sparsifier,
            "consensus": self.row.consensus,
            "space": self.row.space or "delta",
        }
        return compose(factors, weights, **{**chosen, **self.row.options, **bound.kwargs})


def _documentation(row: Row) -> str:
    where = (
        'Dense `[d_out, d_in]` in the space "delta"; "knots" and "core" work in a basis the '
        'adapters share, "factors" on A and B apart, as PEFT does, with cross terms.'
        if row.space is None
        else "In factors: the joint SVD is taken on a QR of the stacked B, never on dense updates."
    )
    return (
        f"{row.formula}\n\n{row.about} {where} {row.cost}.\n\n"
        "Raises:\n    MergeError: an option value out of its range.\n\n"
        f"Source: {row.paper}, {row.url}."
    )


_TIES = ("Yadav et al. 2023, TIES-Merging", "https://arxiv.org/abs/2306.01708")
_DARE = ("Yu et al. 2024, Language Models are Super Mario", "https://arxiv.org/abs/2311.03099")
_KNOTS = (
    "Stoica et al. 2025, Model merging with SVD to tie the KnOTS",
    "https://arxiv.org/abs/2410.19735",
)
_ELECTED = (
    '"total" elects at each place the sign of the sum of the (unweighted) updates, "frequency" '
    "the commonest sign; the mean is over the entries that have it. Entries are trimmed layer by "
    "layer, as in PEFT and mergekit; the authors' code trims over the whole model."
)

ROWS = (
    Row(
        "ties",
        "TIES",
        "Use when the adapters' entries pull in opposite directions.",
        "trim",
        "elect",
        *_TIES,
        formula="`λ · mean over agreeing i of w_i trim(ΔW_i)`, the sign of each entry elected by "
        "all.",
        about="Each update keeps its `density` share of largest entries; " + _ELECTED,
        defaults={"density": 0.2},
    ),
    Row(
        "dare_linear",
        "DARE linear",
        "Use to thin the updates at random, without bias, before summing them.",
        "random_drop",
        "sum",
        *_DARE,
        formula="`λ Σ w_i M_i ⊙ ΔW_i / density`, the masks M_i of independent draws with P(1) = "
        "density.",
        about="The expectation is the linear merge. Draws are made adapter by adapter, A before B; "
        "the paper's drop rate is 1 - density.",
    ),
    Row(
        "dare_ties",
        "DARE TIES",
        "Use to thin the updates at random before a sign election.",
        "random_drop",
        "elect",
        *_DARE,
        formula="TIES with DARE's random mask in place of the trim: `λ · mean over agreeing i`.",
        about="Each entry is kept with probability `density` and divided by it; then signs are "
        "elected and those that agree averaged, as in `ties`.",
    ),
    Row(
        "magnitude_prune",
        "Magnitude pruning",
        "Use to drop each adapter's small entries before summing, without a sign election.",
        "trim",
        "sum",
        "PEFT, add_weighted_adapter",
        "https://huggingface.co/docs/peft/developer_guides/model_merging",
        formula="`λ Σ w_i trim(ΔW_i)`: each update keeps its `density` share of largest entries.",
    ),
    Row(
        "breadcrumbs",
        "Model Breadcrumbs",
        "Use when a few outsized entries of single adapters disturb the sum.",
        "band",
        "sum",
        "Davari & Belilovsky 2024, Model Breadcrumbs",
        "https://arxiv.org/abs/2312.06795",
        formula="`λ Σ w_i m_i ⊙ ΔW_i`: m_i drops the `gamma` share of largest entries, keeps "
        "`density` next.",
        about="What is left, the 1 - density - gamma share of smallest entries (the paper's β), is "
        "dropped. Masks are per layer.",
        defaults={"density": 0.9},
    ),
    Row(
        "della",
        "DELLA",
        "Use in place of DARE TIES to keep large entries with a higher probability.",
        "magprune",
        "elect",
        "Deep et al. 2024, DELLA-Merging",
        "https://arxiv.org/abs/2406.11617",
        formula="`λ · mean over agreeing i of w_i magprune(ΔW_i)`, the sign of each entry elected "
        "by all.",
        about="In each row an entry is kept with a probability that runs, by rank of magnitude, "
        "from density - ε/2 (smallest) to density + ε/2 (largest), and divided by it; density 1 "
        "keeps all.",
    ),
    Row(
        "sce",
        "SCE",
        "Use to weigh each adapter by its own energy in each layer, without tuning weights.",
        "none",
        "energy",
        "Wan et al. 2024, FuseChat",
        "https://arxiv.org/abs/2408.07990",
        formula="`λ Σ η_i ΔW'_i / Σ η_i` over the adapters that agree with the sign of `Σ ΔW'_i`.",
        about="`ΔW'_i` is `w_i ΔW_i` on the `select_topk` share of entries (of those whose "
        "variance over the adapters is not zero) with the largest variance, zero elsewhere; all "
        "entries at 1. The coefficient η_i of a layer is `‖ΔW'_i‖²_F`.",
    ),
    Row(
        "knots_ties",
        "KnOTS TIES",
        "Use TIES in a basis the adapters share rather than on raw entries.",
        "trim",
        "elect",
        *_KNOTS,
        formula="`λ U ties(Σ V_1ᵀ, ..., Σ V_Nᵀ)` where `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`.",
        about="TIES (trim, elect, disjoint mean, here per layer) works on the `[k, d_in]` matrices "
        "of the shared basis, k ≤ R = Σ r_i.",
        space="knots",
        defaults={"density": 0.2},
    ),
    Row(
        "knots_dare_ties",
        "KnOTS DARE TIES",
        "Use DARE TIES in a basis the adapters share rather than on raw entries.",
        "random_drop",
        "elect",
        *_KNOTS,
        formula="`knots_ties` with DARE's random mask in place of the trim.",
        about="Each entry of a `Σ V_iᵀ` is kept with probability `density` and divided by it.",
        space="knots",
    ),
)  # fmt: skip

WEIGHTS: Mapping[str, DefaultWeight] = {"sum": "1/√N", "elect": "1", "energy": "1"}
"""The default weight by consensus: the last two average over the adapters that agree."""

for _row in ROWS:
    register(
        name=_row.name,
        title=_row.title,
        summary=_row.summary,
        paper=_row.paper,
        url=_row.url,
        symmetric=not _row.random,
        low_rank=_row.space is not None,
        default_weight=WEIGHTS[_row.consensus],
    )(RowMethod(_row))

register(
    name="compose",
    title="Composed",
    summary="Use to combine a sparsifier, a consensus and a space that no paper has combined.",
    paper="the parts of TIES, DARE, DELLA, Breadcrumbs, SCE, KnOTS and core space",
    url="https://arxiv.org/abs/2306.01708",
    symmetric=False,
    default_weight=lambda options: WEIGHTS[options["consensus"]],
)(compose)

"""The exact weighted sum, kept in factors."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.options import check_bool, check_number
from orthomerge.merging.registry import Alias, register


@register(
    name="linear",
    title="Linear",
    summary="Use for adapters made to be mergeable: the exact weighted sum of the updates.",
    paper="Wortsman et al. 2022, Model soups",
    url="https://arxiv.org/abs/2203.05482",
    low_rank=True,
    default_weight=lambda options: "1" if options["normalize"] else "1/√N",
    aliases=(
        Alias(
            "task_arithmetic",
            "Task arithmetic",
            "Ilharco et al. 2023, Editing models with task arithmetic",
            "https://arxiv.org/abs/2212.04089",
        ),
        Alias(
            "cat",
            "Concatenation",
            "PEFT, add_weighted_adapter",
            "https://huggingface.co/docs/peft/developer_guides/model_merging",
        ),
        Alias(
            "knots_ta",
            "KnOTS task arithmetic",
            "Stoica et al. 2025, Model merging with SVD to tie the KnOTS",
            "https://arxiv.org/abs/2410.19735",
        ),
    ),
)
def linear(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> LoraFactors:
    """`λ Σ w_i ΔW_i` (divided by `Σ w_i` if `normalize`), exact, in factors of rank Σ r_i.

    A's rows and B's columns are stacked, weights and scalings go into B: unlike PEFT's "linear",
    which adds √w_i A_i and √w_i B_i and so has cross terms. PEFT calls this "cat"; with λ it is
    task arithmetic, which the shared basis of KnOTS does not change. O(Σ r_i (d_in + d_out)).

    Raises:
        MergeError: `normalize` and the weights sum to zero, or `lambda_` is not a finite number.

    Source: Wortsman et al. 2022, arXiv 2203.05482 (averaging weights); Ilharco et al. 2023,
    arXiv 2212.04089 (λ).
    """
    check_bool("normalize", normalize)
    check_number("lambda_", lambda_)
    if normalize:
        total = sum(weights)
        if total == 0:
            raise MergeError("option 'normalize' needs weights that do not sum to zero.")
        weights = [w / total for w in weights]
    return weighted_sum(factors, [lambda_ * w for w in weights])

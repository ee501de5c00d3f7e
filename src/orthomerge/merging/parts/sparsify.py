"""Sparsifiers: which entries of one update survive."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orthomerge.errors import MergeError
from orthomerge.merging.parts.options import check_fraction


def trim(
    update: Float[Tensor, " ..."], density: float, out: Float[Tensor, " ..."] | None = None
) -> Float[Tensor, " ..."]:
    """Keep the ⌊density · n⌋ entries of largest magnitude, zero the others. O(n).

    Of equal ones at the edge the earlier are kept. The result goes into `out` where that is given,
    which may be `update` itself. The trim step of TIES (Yadav et al. 2023, arXiv 2306.01708).
    """
    if density >= 1:
        return update if out is None else out.copy_(update)
    return keep_largest(update, int(density * update.numel()), out)


def keep_largest(
    update: Float[Tensor, " ..."], count: int, out: Float[Tensor, " ..."] | None = None
) -> Float[Tensor, " ..."]:
    """`trim` to a number of entries, fewer than there are."""
    below = _just_below(update, count)
    if below is not None:  # one pass, and nothing of the update's size beside it
        return torch.hardshrink(update, below, out=out)
    mask = _largest(update.abs().flatten(), count).view_as(update)
    kept = torch.where(mask, update, 0.0)
    return kept if out is None else out.copy_(kept)


def _just_below(update: Float[Tensor, " ..."], count: int) -> float | None:
    """The size below which all but the `count` largest entries lie, they themselves above it.

    None where equal sizes lie on both sides, nothing is kept, or the update is not on the CPU.
    O(n): nothing is sorted.
    """
    if count <= 0 or update.device.type != "cpu":
        return None
    values, place = update.abs().flatten().numpy(), update.numel() - count
    values.partition(place)
    least = values[place]
    if place and values[:place].max() == least:
        return None
    return float(np.nextafter(least, values.dtype.type(0)))


def _largest(sizes: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Which `count` entries are largest, the earlier of equal ones. O(n): nothing is sorted."""
    if count <= 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    place = len(sizes) - count
    if sizes.device.type == "cpu":  # a third of the time of torch.kthvalue
        least = float(np.partition(sizes.numpy(), place)[place])
    else:
        least = float(sizes.kthvalue(place + 1).values)
    mask = sizes >= least
    more = int(mask.count_nonzero()) - count
    if more:
        mask[(sizes == least).nonzero().flatten()[-more:]] = False
    return mask


def random_drop(
    update: Float[Tensor, " ..."],
    density: float,
    generator: torch.Generator | None,
    out: Float[Tensor, " ..."] | None = None,
) -> Float[Tensor, " ..."]:
    """Keep each entry with probability `density`, rescaled by 1/density: unbiased. O(n).

    Drop-and-rescale of DARE (Yu et al. 2023, arXiv 2311.03099; its drop rate is 1 - density). The
    mask is drawn in float32 on the generator's device (CPU for None), whatever the update's. The
    result goes into `out` where that is given, which may be `update` itself.
    """
    if density >= 1:
        return update if out is None else out.copy_(update)
    device = torch.device("cpu") if generator is None else generator.device
    # What torch.bernoulli draws, in half the time.
    drawn = torch.rand(update.shape, generator=generator, dtype=torch.float32, device=device)
    dropped = (drawn >= density).to(update.device)
    kept = torch.div(update, density, out=out)
    return kept.masked_fill_(dropped, 0.0)


def bernoulli(
    probability: Float[Tensor, " ..."], generator: torch.Generator | None
) -> Float[Tensor, " ..."]:
    """A 0/1 draw for each probability, made on the generator's device (CPU for None)."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.bernoulli(probability.to(device), generator=generator)


def band(update: Float[Tensor, " ..."], density: float, gamma: float) -> Float[Tensor, " ..."]:
    """Drop the ⌊gamma · n⌋ largest magnitudes, keep the next ⌊density · n⌋. O(n).

    The mask of Model Breadcrumbs (Davari & Belilovsky 2023, arXiv 2312.06795).
    """
    sizes = update.abs().flatten()
    top = int(gamma * len(sizes))
    kept = _largest(sizes, top + int(density * len(sizes))) & ~_largest(sizes, top)
    return torch.where(kept.view_as(update), update, 0.0)


def magprune(
    update: Float[Tensor, "rows columns"],
    density: float,
    epsilon: float,
    generator: torch.Generator | None,
) -> Float[Tensor, "rows columns"]:
    """Keep an entry with a probability that grows with its magnitude, rescaled by its inverse.

    In each row the keep probability runs linearly by rank of magnitude from density - ε/2 to
    density + ε/2: unbiased. The MAGPRUNE step of DELLA (Deep et al. 2024, arXiv 2406.11617).
    O(n log n).
    """
    if density >= 1:
        return update
    ranks = update.abs().argsort(dim=1, stable=True).argsort(dim=1)
    steps = max(update.shape[1] - 1, 1)
    # One value a rank, worked out on the CPU: other devices round the same sum otherwise.
    levels = density + epsilon * (torch.arange(update.shape[1], dtype=torch.float32) / steps - 0.5)
    keep = levels.to(update.device)[ranks]
    return update * bernoulli(keep, generator).to(update) / keep.to(update)


def check_epsilon(density: float, epsilon: float) -> None:
    """The width of `magprune`'s keep probabilities: they must stay within (0, 1].

    Raises:
        MergeError: they do not, or epsilon is not in [0, 1].
    """
    check_fraction("epsilon", epsilon, zero=True)
    if density < 1 and not (density - epsilon / 2 > 0 and density + epsilon / 2 <= 1):
        raise MergeError(
            f"option 'epsilon' must keep density ± epsilon/2 within (0, 1], not {epsilon} "
            f"at density {density}."
        )

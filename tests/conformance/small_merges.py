"""Small adapters, what methods need beside them, and merges of them."""

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeMethod, merge_layers
from orthomerge.moments import SecondMoment

# Methods that work on A and B apart need equal ranks.
EQUAL_RANKS = {"robust_merge"}
WEIGHTS = [0.7, 1.3, 0.4]
SHAPES = {"q": (9, 7), "v": (6, 8)}


def adapter(seed: int, rank: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, LoraFactors]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, d_in, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(d_out, rank, generator=g, dtype=torch.float64).to(dtype),
            0.5 + seed,
        )
        for name, (d_out, d_in) in SHAPES.items()
    }


def three(method: MergeMethod, dtype: torch.dtype = torch.float64) -> list[dict[str, LoraFactors]]:
    """Three adapters (two for slerp) of different ranks, not so small that nothing overlaps."""
    ranks = (2, 2, 2) if method.name in EQUAL_RANKS else (2, 3, 2)
    ranks = ranks[: 2 if method.name == "slerp" else 3]
    return [adapter(seed, rank, dtype) for seed, rank in enumerate(ranks)]


class Statistics:
    """The statistics of one task: a moment of some rows for every layer."""

    def __init__(self, number: int) -> None:
        self.number = number

    def rows(self, layer: str) -> torch.Tensor:
        g = torch.Generator().manual_seed(100 + self.number)
        d_in = SHAPES.get(layer, (4, 5))[1]
        return torch.randn(40, d_in, generator=g, dtype=torch.float64) @ torch.diag(
            torch.linspace(0.2, 1 + self.number, d_in, dtype=torch.float64)
        )

    def moment(self, layer: str) -> SecondMoment:
        return SecondMoment(self.rows(layer).shape[1]).update(self.rows(layer))


def information(number: int, shapes=None) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(200 + number)
    return {
        name: torch.rand(*shape, generator=g, dtype=torch.float64) ** 2 * (number + 1)
        for name, shape in (shapes or {**SHAPES}).items()
    }


def needs(method: MergeMethod, numbers) -> dict:
    """What the method must be given beside the adapters, by their numbers: they may be permuted."""
    given = {}
    if "moments" in method.needs:
        given["statistics"] = [Statistics(number) for number in numbers]
    if "fisher" in method.needs:
        given["fisher"] = [information(number) for number in numbers]
    return given


def merge(method: MergeMethod, adapters, numbers=None, **arguments):
    arguments.setdefault("weights", WEIGHTS[: len(adapters)])
    given = needs(method, numbers or range(len(adapters)))
    return merge_layers(adapters, method=method.name, **{**given, **arguments})


def dense_of(update):
    return update.delta() if isinstance(update, LoraFactors) else update


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(a.double(), b.double(), atol=atol, rtol=atol)


def dense(adapters, layer):
    return [a[layer].scaling * a[layer].B.double() @ a[layer].A.double() for a in adapters]


def mixed(a: LoraFactors, b: LoraFactors) -> LoraFactors:
    return LoraFactors(
        torch.cat([a.A, b.A]), torch.cat([a.scaling * a.B, 2 * b.scaling * b.B], dim=1)
    )

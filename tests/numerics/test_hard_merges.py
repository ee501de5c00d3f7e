"""Every merging method on hard adapters, against itself in float64; see docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.factors import LoraFactors
from orthomerge.merging import list_methods, merge_layers
from orthomerge.moments import SecondMoment

D_OUT, D_IN = 12, 10
every = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
PAIR = {"slerp"}
# These give weak directions the weight of strong ones, or let them vote: what is lost in float32,
# in which narrow adapters are worked on, cannot have it.
BY_DIRECTION = {"tsv_m", "iso_c", "iso_cts", "knots_ties", "knots_dare_ties", "core_space"}
FLOAT32 = torch.finfo(torch.float32).eps


def gaussian(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def factors(seed, rank=3, condition=1.0, d_out=D_OUT, d_in=D_IN):
    """An update whose singular values fall from 1 to 1 / condition."""
    A = torch.linalg.qr(gaussian(d_in, rank, seed=seed))[0].T
    B = torch.linalg.qr(gaussian(d_out, rank, seed=seed + 1))[0]
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), rank, dtype=torch.float64)
    return LoraFactors(A.contiguous(), B * values, 1.0)


class Statistics:
    def __init__(self, number):
        self.number = number

    def moment(self, layer):
        return SecondMoment(D_IN).update(gaussian(40, D_IN, seed=500 + self.number))


def merge(method, adapters, **more):
    count = len(adapters)
    given_ = {}
    if "moments" in method.needs:
        given_["statistics"] = [Statistics(i) for i in range(count)]
    if "fisher" in method.needs:
        given_["fisher"] = [
            {"q": gaussian(D_OUT, D_IN, seed=900 + i).square()} for i in range(count)
        ]
    more.setdefault("weights", 1.0)
    return merge_layers([{"q": a} for a in adapters], method=method.name, **given_, **more)


def several(method, count, **how):
    return [factors(10 * s, **how) for s in range(2 if method.name in PAIR else count)]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6, 1e12])
def test_narrow_and_ill_conditioned_adapters_are_merged_wide(method, dtype, condition):
    adapters = [a.to(dtype) for a in several(method, 3, condition=condition)]
    wide = merge(method, [a.to(torch.float64) for a in adapters]).dense("q")
    found = merge(method, adapters).dense("q")
    assert found.dtype == dtype and bool(found.isfinite().all())
    error, size = float((found.double() - wide).norm()), max(float(wide.norm()), 1.0)
    if method.name not in BY_DIRECTION:
        assert error <= 8 * torch.finfo(dtype).eps * size
    elif condition <= 1e3:
        assert error <= 8 * (torch.finfo(dtype).eps + FLOAT32 * condition) * size
    else:
        assert float(found.double().norm()) <= 4 * sum(
            float(a.delta().double().norm()) for a in adapters
        )


@every
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_the_unit_of_the_updates_does_not_matter(method, seed, power):
    """Updates 2^k times as large merge to 2^k times as much, to the last bits."""
    adapters = [factors(seed + 10 * s) for s in range(2 if method.name in PAIR else 3)]
    scaled = [LoraFactors(a.A, a.B * 2.0**power, a.scaling) for a in adapters]
    plain, large = merge(method, adapters).dense("q"), merge(method, scaled).dense("q")
    torch.testing.assert_close(large / 2.0**power, plain, atol=1e-8, rtol=1e-8)


@every
def test_a_hundred_adapters(method):
    if method.name in PAIR:
        pytest.skip("takes two")
    adapters = several(method, 100)
    found = merge(method, adapters, weights=0.01).dense("q")
    most = sum(float(a.delta().norm()) for a in adapters)
    assert bool(found.isfinite().all()) and float(found.norm()) <= most
    if method.symmetric and not method.needs:
        back = merge(method, adapters[::-1], weights=0.01).dense("q")
        torch.testing.assert_close(back, found, atol=1e-9, rtol=1e-9)


@every
@pytest.mark.parametrize("count", [2, 5])
def test_adapters_that_are_the_same_and_layers_that_are_nothing(method, count):
    one = factors(7)
    copies = [one] * (2 if method.name in PAIR else count)
    found = merge(method, copies).dense("q")
    assert bool(found.isfinite().all())
    assert float(found.norm()) <= 2 * count * float(one.delta().norm())
    nothing = [LoraFactors(a.A, torch.zeros_like(a.B), 1.0) for a in copies]
    assert not merge(method, nothing).dense("q").any()


@every
@pytest.mark.parametrize("rank", [1, 512])
def test_ranks_to_512(method, rank):
    """Ranks that fill the layer, or exceed it together: d_in < rank × adapters."""
    if method.needs:
        pytest.skip("statistics of the small layer")
    adapters = [factors(10 * s, rank=rank, d_out=512, d_in=512) for s in range(2)]
    found = merge(method, adapters)
    assert bool(found.dense("q").isfinite().all())
    assert float(found.dense("q").norm()) <= 4 * sum(float(a.delta().norm()) for a in adapters)

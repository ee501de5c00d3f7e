"""A small adapter out: `rank="auto"` in every merge, one adapter resized; PEFT is the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call
from hypothesis import given
from hypothesis import strategies as st
from peft_oracle import bert, gpt2, loaded, outputs, save_adapter, weights

from orthomerge import verify
from orthomerge.adapters import merge_adapters, read_adapter, resize_adapter
from orthomerge.cli._options import kept_energy
from orthomerge.errors import OrthomergeError
from orthomerge.experiment.arms import Merge
from orthomerge.factors import LoraFactors, rank_for, truncate_measured
from orthomerge.merging import MergeConfig, merge_layers
from orthomerge.merging.parts.lowrank import truncate_to_energy


def factors(seed: int, rank: int) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 12, generator=g, dtype=torch.float64)
    return LoraFactors(A, torch.randn(10, rank, generator=g, dtype=torch.float64), 0.5)


ONE, TWO = {"q": factors(1, 3), "v": factors(2, 3)}, {"q": factors(3, 3), "v": factors(4, 2)}


def least_rank(dense: torch.Tensor, energy: float) -> tuple[int, float]:
    """The least rank that keeps the energy, and the relative error there, from the dense matrix."""
    squares = torch.linalg.svdvals(dense.double()).square()
    kept = squares.cumsum(0) / squares.sum()
    rank = int((kept < energy - 1e-9).sum()) + 1
    return rank, float((1 - kept[rank - 1]).clamp(min=0).sqrt())


METHODS = ["linear", "ties", "svd", "knots_ties", "core_space", "tsv_m", "iso_c", "slerp"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [0.6, 0.99])
def test_auto_keeps_the_energy_with_the_least_rank_whatever_the_method(method, energy):
    whole = merge_layers([ONE, TWO], method=method, rank=9 if method == "svd" else "full")
    small = merge_layers([ONE, TWO], method=method, rank="auto", energy=energy)
    for name in whole.layers:
        dense = whole.dense(name)
        rank, error = least_rank(dense, energy)
        assert small.layers[name].rank == rank
        assert small.truncation_error[name] == pytest.approx(error, abs=1e-5)
        lost = torch.linalg.norm(dense - small.dense(name)) / torch.linalg.norm(dense)
        assert float(lost) == pytest.approx(error, abs=1e-5)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 1.0))
def test_the_rank_of_an_energy_is_the_least_and_the_same_for_factors_and_dense(r, m, n, energy):
    g = torch.Generator().manual_seed(r * 100 + m * 10 + n)
    update = LoraFactors(torch.randn(r, n, generator=g), torch.randn(m, r, generator=g), 0.5)
    dense = update.delta()
    values = torch.linalg.svdvals(dense.double())
    rank = rank_for(values, energy, max(m, n), torch.float32)
    total = float(values.square().sum())
    assert float(values[rank:].square().sum()) <= (1 - energy) * total + 1e-9 * total
    if rank > 1:
        assert float(values[rank - 1 :].square().sum()) > (1 - energy) * total - 1e-9 * total
    for given_as in (update, dense):
        part, error = truncate_to_energy(given_as, energy)
        lost = float(torch.linalg.norm(part.delta() - dense)) / total**0.5
        assert lost == pytest.approx(error, abs=1e-5)
        assert lost**2 <= 1 - energy + 1e-5


def test_an_update_of_zero_and_all_of_the_energy():
    zero = torch.zeros(4, 3)
    assert truncate_to_energy(zero, 0.9)[0].rank == 1
    assert truncate_measured(LoraFactors(zero[:2], zero[:, :2]), energy=0.9)[1] == 0
    exact = LoraFactors(torch.randn(3, 20), torch.randn(30, 3))
    part, error = truncate_to_energy(exact.delta(), 1.0)
    assert part.rank == 3 and error < 1e-5
    torch.testing.assert_close(part.delta(), exact.delta(), rtol=1e-4, atol=1e-4)


def test_an_energy_is_the_rank_auto_and_no_other():
    assert MergeConfig(energy=0.9) == MergeConfig(rank="auto", energy=0.9)
    assert MergeConfig(rank="auto").energy == 0.99
    assert MergeConfig.of(MergeConfig(energy=0.9), rank=4) == MergeConfig(rank=4)
    with pytest.raises(OrthomergeError, match="goes with the rank 'auto', not 4"):
        MergeConfig(rank=4, energy=0.9)
    for energy in (0, 1.5, float("nan")):
        with pytest.raises(OrthomergeError, match="is no part to keep"):
            MergeConfig(energy=energy)
    assert Merge(method="ties", energy=0.9).config(1.0, 0).energy == 0.9
    assert Merge(method="ties", rank="auto").config(1.0, 0).energy == 0.99
    assert kept_energy(None, 0.1) == pytest.approx(0.99)
    with pytest.raises(OrthomergeError, match="no --energy with it"):
        kept_energy(0.9, 0.1)


def test_a_merge_by_energy_says_so_and_is_done_again(tmp_path):
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, bert, seed, target_modules=["query", "value"])
    merged = merge_adapters(
        [tmp_path / "a", tmp_path / "b"], method="ties", energy=0.8, output=tmp_path / "out"
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["rank"], record["energy"]) == ("auto", 0.8)
    assert "keeps 0.8 of a layer's energy" in (tmp_path / "out" / "README.md").read_text()
    assert max(merged.truncation_error.values()) <= 0.2**0.5
    assert all(c.good for c in verify(tmp_path / "out", redo=True))
    loaded(tmp_path / "out", bert)


@pytest.mark.parametrize("base, targets", [(bert, ["query", "value"]), (gpt2, ["c_attn", "c_fc"])])
def test_a_resized_adapter_is_the_best_one_of_its_rank_in_peft(tmp_path, base, targets):
    kind = "SEQ_CLS" if base is bert else "CAUSAL_LM"
    large = save_adapter(
        tmp_path / "a", base, 1, r=6, lora_alpha=16, use_rslora=True, target_modules=targets,
        task_type=kind, rank_pattern={targets[0]: 3},
    )  # fmt: skip
    small = resize_adapter(large, tmp_path / "small", rank=2)
    plain, before, after = (
        {k: v.double() for k, v in base().state_dict().items()},
        weights(large, base),
        weights(tmp_path / "small", base),
    )
    for name in read_adapter(large).layers:
        key = f"{name}.weight"
        U, s, Vh = torch.linalg.svd(before[key] - plain[key], full_matrices=False)
        best = U[:, :2] * s[:2] @ Vh[:2]
        torch.testing.assert_close(after[key] - plain[key], best, rtol=0, atol=1e-5)
        lost = float(s[2:].square().sum() / s.square().sum()) ** 0.5
        assert small.truncation_error[name] == pytest.approx(lost, abs=1e-5)
    for key in plain.keys() - {f"{name}.weight" for name in small.layers}:
        assert torch.equal(before[key], after[key]), key  # the head with them


def test_a_resize_that_keeps_everything_changes_no_logit(tmp_path):
    large = save_adapter(
        tmp_path / "a", bert, 1, r=6, target_modules=["query", "value"], task_type="SEQ_CLS",
        rank_pattern={"query": 2},
    )  # fmt: skip
    said = json.loads(
        call("resize", large, "--energy", "1", "--output", tmp_path / "small", "--json")
    )
    assert {name.rpartition(".")[2]: rank for name, rank in said["ranks"].items()} == {
        "query": 2,
        "value": 6,
    }
    assert max(said["truncation_error"].values()) < 1e-5
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "small", bert)), outputs(loaded(large, bert)), rtol=0, atol=1e-5
    )
    kept = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert set(kept["modules_to_save"]) >= {"classifier"} and kept["task_type"] == "SEQ_CLS"


def test_words_that_are_no_rank_of_one_adapter(tmp_path):
    with pytest.raises(OrthomergeError, match="the rank 'sum' is none"):
        resize_adapter(tmp_path, tmp_path / "small", rank="sum")

"""Adapters in one basis per layer: held to dense algebra, to PEFT, and to their own folders."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call
from peft_oracle import bert, llama, loaded, outputs, save_adapter
from safetensors.torch import load_file

from orthomerge.adapters import expand_shared, read_adapter, share_adapters, verify
from orthomerge.adapters.share import share_layer
from orthomerge.errors import AdapterError, MergeError, OrthomergeError
from orthomerge.factors import LoraFactors

QV = {"target_modules": ["query", "value"]}
KINDS = {
    "plain": (bert, QV, {"target_modules": ["query", "key"], "r": 2}),
    "biases": (llama, *[{"target_modules": ["q_proj"], "lora_bias": True}] * 2),
    "embeddings": (llama, *[{"target_modules": ["embed_tokens", "q_proj"]}] * 2),
    "whole modules": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ),
}


def folders_of(tmp_path, kind):
    make, *configs = KINDS[kind]
    make().save_pretrained(tmp_path / "base")
    named = str(tmp_path / "base")
    return make, [
        save_adapter(tmp_path / name, make, seed, base_name=named, **config)
        for seed, (name, config) in enumerate(zip("ab", configs, strict=True))
    ]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("side", ["both", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_sum_of_the_ranks_every_task_is_what_it_was(kind, side, compact, tmp_path):
    make, folders = folders_of(tmp_path, kind)
    found = share_adapters(folders, tmp_path / "out", 8, side=side, compact=compact)
    places = [tmp_path / "out" / "tasks" / task for task in found.tasks]
    if compact:
        places = expand_shared(tmp_path / "out", tmp_path / "made")
    for folder, place in zip(folders, places, strict=True):
        expected = outputs(loaded(folder, make))
        torch.testing.assert_close(outputs(loaded(place, make)), expected, atol=2e-4, rtol=1e-4)
    first, second = (load_file(place / "adapter_model.safetensors") for place in places)
    keys = [key for key in first if "lora_A" in key or "lora_embedding_A" in key]
    assert keys
    assert all(torch.equal(first[key], second[key]) for key in keys)
    assert max(found.total.values()) < 1e-5


def test_the_compact_form_is_the_folders(tmp_path):
    _make, folders = folders_of(tmp_path, "plain")
    share_adapters(folders, tmp_path / "out", 3)
    share_adapters(folders, tmp_path / "small", 3, compact=True)
    for made in expand_shared(tmp_path / "small", tmp_path / "made"):
        ours = load_file(made / "adapter_model.safetensors")
        theirs = load_file(tmp_path / "out" / "tasks" / made.name / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-5)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        for name in ("out", "small")
    ]
    assert sizes[1] < sizes[0]


def drawn(count, rank, d_out=20, d_in=30, common=2):
    """Updates that have some directions in common and some of their own, of unlike sizes."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(common, d_in, generator=g)
    B = torch.randn(d_out, common, generator=g)
    found = []
    for task in range(count):
        own_A = torch.randn(rank, d_in, generator=g)
        own_B = torch.randn(d_out, rank, generator=g) * 0.3
        mix = torch.randn(common, common, generator=g)
        found.append(LoraFactors(torch.cat([mix @ A, own_A]), torch.cat([B, own_B], 1), 10.0**task))
    return found


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_side_is_the_best_there_is(rank):
    factors = drawn(3, 2)
    dense = [f.delta().double() for f in factors]
    gram = sum((d / d.norm()).T @ (d / d.norm()) for d in dense)
    V = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    found = share_layer(factors, rank, "right")
    for task, update in enumerate(dense):
        error = float((update - update @ V @ V.T).norm() / update.norm())
        assert found.errors[task] == pytest.approx(error, rel=1e-4)
        ours = found.B(task).double() @ found.A.double()
        assert float((update - ours).norm() / update.norm()) == pytest.approx(error, rel=1e-4)
    torch.testing.assert_close(found.A @ found.A.T, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_both_sides_lie_between_one_side_and_each_side_by_itself(rank):
    factors = drawn(3, 2)
    unit = [f.delta().double() / f.delta().double().norm() for f in factors]
    U = torch.linalg.eigh(sum(d @ d.T for d in unit)).eigenvectors[:, -rank:]
    V = torch.linalg.eigh(sum(d.T @ d for d in unit)).eigenvectors[:, -rank:]
    apart = sum(float((d - U @ U.T @ d @ V @ V.T).norm()) ** 2 for d in unit)
    found, right = (share_layer(factors, rank, side) for side in ("both", "right"))
    total = sum(e**2 for e in found.errors)
    assert sum(e**2 for e in right.errors) <= total + 1e-9
    assert total <= apart + 1e-6
    assert found.coordinates[0].shape == (rank, rank)
    # No basis of one side with the other held is better.
    half = [found.left.double().T @ d for d in unit]
    best = torch.linalg.eigvalsh(sum(h.T @ h for h in half))[-rank:].sum()
    assert total == pytest.approx(3 - float(best), abs=1e-6)


def test_errors_and_sizes_are_kept(tmp_path):
    _, folders = folders_of(tmp_path, "plain")
    found = share_adapters(folders, tmp_path / "out", 2)
    record = json.loads((tmp_path / "out" / "share.json").read_text())
    assert record["errors"] == {t: dict(e) for t, e in found.errors.items()}
    for folder, task in zip(folders, found.tasks, strict=True):
        before = read_adapter(folder).layers
        after = read_adapter(tmp_path / "out" / "tasks" / task).layers
        lost = norm = 0.0
        for name, factors in before.items():
            difference = (factors.delta() - after[name].delta()).double().norm()
            assert found.errors[task][name] == pytest.approx(
                float(difference / factors.delta().double().norm()), rel=1e-3, abs=1e-6
            )
            lost += float(difference) ** 2
            norm += float(factors.delta().double().norm()) ** 2
        assert found.total[task] == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    values = [f.A.numel() + f.B.numel() for x in folders for f in read_adapter(x).layers.values()]
    assert found.before == sum(values)
    assert {check.state for check in verify(tmp_path / "out")} == {"same"}
    with pytest.raises(AdapterError, match="in one basis"):
        verify(tmp_path / "out", redo=True)
    share_adapters(folders, tmp_path / "out", 3, overwrite=True)


def test_what_is_refused(tmp_path):
    _, folders = folders_of(tmp_path, "plain")
    out = tmp_path / "out"
    for words, arguments in {
        "two or more": (folders[:1], out, 2),
        "rank 0": (folders, out, 0),
        "inside the input": (folders, folders[0] / "x", 2),
    }.items():
        with pytest.raises(OrthomergeError, match=words):
            share_adapters(*arguments)
    with pytest.raises(MergeError, match="both"):
        share_adapters(folders, out, 2, side="bth")
    with pytest.raises(AdapterError, match="--compact"):
        expand_shared(folders[0], out)
    assert not out.exists()


def test_the_command(tmp_path):
    _, folders = folders_of(tmp_path, "plain")
    said = call("share", *folders, "--rank", 2, "-o", tmp_path / "out")
    assert "adapters of rank 2" in said and "largest" in said
    found = json.loads(
        call("share", *folders, "--rank", 2, "--compact", "-o", tmp_path / "small", "--json")
    )
    assert set(found["total"]) == {"a", "b"}
    call("share", "--expand", tmp_path / "small", "-o", tmp_path / "made")
    assert (tmp_path / "made" / "a" / "adapter_config.json").is_file()

"""What holds `A` while it trains: projected after every step, or frozen."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_bert
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orthomerge.adapters import (
    Directions,
    Projection,
    freeze_A,
    lora_layers,
    new_lora,
    read_excluded,
    save_start,
)
from orthomerge.errors import AdapterError
from orthomerge.subspace import orthonormal_rows

D, RANK = 32, 4


def lora(seed=0):
    return new_lora(
        tiny_bert(), targets=["query", "value"], rank=RANK, alpha=8, task_type="SEQ_CLS", seed=seed
    )


def directions(model, k=20, within=False, seed=0):
    """Random directions, one tensor for the layers of a block, which read one input."""
    g = torch.Generator().manual_seed(seed)
    rows: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for name in lora_layers(model):
        block = name.rsplit(".", 1)[0]
        if block not in shared:
            drawn = torch.randn(k, D, generator=g, dtype=torch.float64)
            shared[block] = orthonormal_rows(drawn)
        rows[name] = shared[block]
    return Directions(rows, within)


def weights(model):
    return {n: m.lora_A["default"].weight for n, m in lora_layers(model).items()}


def wrong_side(model, kept):
    """The oracle: the norm of what is where `A` must not be, layer by layer, in float64."""
    found = []
    for name, A in weights(model).items():
        inside = A.detach().double() @ kept.rows[name].T
        outside = A.detach().double() - inside @ kept.rows[name]
        found.append(float((outside if kept.within else inside).norm()))
    return max(found)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    ids = torch.randint(5, 30, (4, 6))
    loss = model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=500.0),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=50.0, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=2e-2),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_after_every_step_of_any_optimizer_a_is_on_the_right_side(name, within):
    model = lora().train()
    for layer in lora_layers(model).values():  # so that A has a gradient from the first step
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    kept = directions(model, within=within)
    optimizer = OPTIMIZERS[name](list(weights(model).values()))
    before = {n: A.detach().clone() for n, A in weights(model).items()}
    assert wrong_side(model, kept) > 0.1
    projection = Projection(model, kept)
    handle = projection.attach(optimizer)
    assert wrong_side(model, kept) <= 1e-6  # at once, before any step
    started = {n: A.detach().clone() for n, A in weights(model).items()}
    for seed in range(12):
        step(model, optimizer, seed)
        assert wrong_side(model, kept) <= 1e-6
        assert projection.violation() == pytest.approx(wrong_side(model, kept), abs=1e-9)
    for n, A in weights(model).items():
        assert float((A.detach() - started[n]).norm()) > 1e-3  # it does train
        # What it began with on the right side was left there.
        rows = kept.rows[n].float()
        quiet = before[n] @ rows.T @ rows if within else before[n] - before[n] @ rows.T @ rows
        torch.testing.assert_close(started[n], quiet, atol=1e-5, rtol=0)
    handle.remove()
    step(model, optimizer, 99)
    assert wrong_side(model, kept) > 1e-6
    assert not optimizer._optimizer_step_post_hooks


def test_what_is_left_on_the_wrong_side_is_rounding_however_long_the_rows():
    model = lora()
    kept = directions(model)
    with torch.no_grad():
        for A in weights(model).values():
            A.mul_(1e4)
    Projection(model, kept).apply()
    for name, A in weights(model).items():
        inside = A.detach().double() @ kept.rows[name].T
        assert float(inside.norm()) <= 1e-7 * float(A.detach().norm())


def test_plain_rows_by_layer_are_taken_as_directions_to_stay_out_of():
    model = lora()
    kept = directions(model)
    Projection(model, dict(kept.rows)).apply()
    assert wrong_side(model, kept) <= 1e-6


def test_no_directions_hold_nothing_back_and_all_of_them_everything():
    model = lora()
    before = {n: A.detach().clone() for n, A in weights(model).items()}
    Projection(model, {n: torch.zeros(0, D).double() for n in before}).apply()
    assert all(torch.equal(A, before[n]) for n, A in weights(model).items())
    Projection(model, {n: torch.eye(D).double() for n in before}).apply()
    assert all(float(A.detach().norm()) <= 1e-6 for A in weights(model).values())


def test_frozen_rows_are_bit_identical_after_training():
    model = lora().train()
    freeze_A(model)
    before = {n: A.detach().clone() for n, A in weights(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1, weight_decay=0.5)
    for seed in range(3):
        step(model, optimizer, seed)
    assert all(torch.equal(A, before[n]) for n, A in weights(model).items())
    assert all(m.lora_B["default"].weight.any() for m in lora_layers(model).values())


@pytest.mark.parametrize("within", [False, True])
def test_a_start_carries_its_directions_each_tensor_once(tmp_path, within):
    model = lora()
    kept = directions(model, within=within)
    folder = save_start(model, tmp_path / "start", kept)
    held = load_file(folder / "kept_out.safetensors")
    assert len(held) == 2 < len(kept.rows)
    read = read_excluded(folder)
    assert read.within == within
    assert set(read.rows) == set(kept.rows)
    assert all(torch.equal(read.rows[n], rows) for n, rows in kept.rows.items())
    Projection(model, read).apply()
    assert wrong_side(model, kept) <= 1e-6


def test_equal_directions_give_equal_bytes_and_older_files_are_read(tmp_path):
    model = lora()
    kept = directions(model, within=True)
    files = [save_start(model, tmp_path / n, kept) / "kept_out.safetensors" for n in "abcdefgh"]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="pt") as stream:
        about = json.loads(stream.metadata()["directions"])
    tensors = {n: t.clone() for n, t in load_file(files[0]).items()}
    save_file(tensors, files[0], metadata={k: json.dumps(v) for k, v in about.items()})
    older = read_excluded(tmp_path / "a")
    assert older.within
    assert all(torch.equal(older.rows[n], rows) for n, rows in kept.rows.items())


def test_directions_that_do_not_belong_are_refused():
    model = lora()
    kept = directions(model)
    names = list(kept.rows)
    missing = {n: kept.rows[n] for n in names[:-1]}
    with pytest.raises(AdapterError, match=f"no directions to keep layer '{names[-1]}'"):
        Projection(model, missing)
    for wrong in (torch.ones(2, D + 1).double(), torch.ones(D).double()):
        with pytest.raises(AdapterError, match=f"layer '{names[0]}' has {D} inputs"):
            Projection(model, {**kept.rows, names[0]: wrong})
    for bent in (2 * kept.rows[names[0]], kept.rows[names[0]] * torch.nan):
        with pytest.raises(AdapterError, match="not orthonormal"):
            Projection(model, {**kept.rows, names[0]: bent})
    with pytest.raises(AdapterError, match="no LoRA layer"):
        Projection(tiny_bert(), kept)  # pyright: ignore[reportArgumentType]


def test_a_start_without_directions_or_with_broken_ones_is_refused_in_one_sentence(tmp_path):
    model = lora()
    plain = save_start(model, tmp_path / "plain")
    with pytest.raises(AdapterError, match=r"has no kept_out.*--constraint project") as said:
        read_excluded(plain)
    assert str(said.value).count(". ") == 0
    folder = save_start(model, tmp_path / "start", directions(model))
    path = folder / "kept_out.safetensors"
    whole = path.read_bytes()
    # Copies: the file under a mapped tensor is about to be cut.
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    layers = json.dumps(dict.fromkeys(lora_layers(model), "gone"))
    breaks = {
        "cut": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "empty": lambda: path.write_bytes(b""),
        "no header": lambda: save_file(tensors, path),
        "a tensor gone": lambda: save_file(
            tensors, path, metadata={"layers": layers, "within": "false"}
        ),
        "not JSON": lambda: save_file(tensors, path, metadata={"layers": "{", "within": "false"}),
        "a list of all": lambda: save_file(tensors, path, metadata={"directions": "[1]"}),
        "a list": lambda: save_file(tensors, path, metadata={"layers": "[1]", "within": "false"}),
    }
    for damage in breaks.values():
        damage()
        with pytest.raises(AdapterError, match="make the start again"):
            read_excluded(folder)

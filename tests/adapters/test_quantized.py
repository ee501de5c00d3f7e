"""Merges onto quantized bases: held to the packages that quantized them, and to layouts by hand."""

from __future__ import annotations

import json

import pytest
import torch
from peft_oracle import save_adapter
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from orthomerge.adapters import merge_to_model, read_adapter, verify
from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.adapters.quantized import packed_weights, plain_tensors
from orthomerge.errors import AdapterError

NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()


def base_of(folder, how, pack, dtype="bfloat16"):
    """A tiny Llama whose projections are packed by `pack(layer's name, weight)` -> tensors."""
    llama().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {n: tensors.pop(f"{n}.weight") for n in NAMES}
    for name, weight in plain.items():
        tensors |= {f"{name}.{leaf}": t.contiguous() for leaf, t in pack(name, weight).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": how, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text("{}")
    return folder


def weights_of(folder):
    """Every weight of a checkpoint as floats."""
    tensors = read_checkpoint(folder).tensors
    settings = json.loads((folder / "config.json").read_text())
    packed = packed_weights(tensors, settings, folder)
    found = plain_tensors(tensors, packed, settings)
    return {key: found[key].make() for key in packed}


def packed_int32(codes, bits, dim=1):
    """Codes beside each other in whole numbers of 32 bits, the first in the lowest."""
    codes = codes.long() if dim == 1 else codes.long().T
    groups = codes.reshape(len(codes), -1, 32 // bits)
    wide = sum(groups[:, :, i] << (bits * i) for i in range(32 // bits))
    wide = torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
    return wide if dim == 1 else wide.T


def drawn(name, *shape, least=0, most=16):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randint(least, most, shape, generator=g)


class Gptq:
    """Codes, zeros, scales and groups in any order, by AutoGPTQ's layout."""

    def __init__(self, bits, offset):
        self.bits, self.offset = bits, offset
        self.how = {"quant_method": "gptq", "bits": bits, "group_size": 16}
        self.how |= {} if offset else {"checkpoint_format": "gptq_v2"}
        self.dense = {}

    def __call__(self, name, weight):
        d_out, d_in = weight.shape
        most = 2**self.bits
        q = drawn(name, d_in, d_out, most=most)
        zeros = drawn(name + "z", d_in // 16, d_out, least=1, most=most)
        scales = (drawn(name + "s", d_in // 16, d_out, most=100) / 997 + 0.01).half()
        group = torch.arange(d_in).flip(0) // 16
        self.dense[f"{name}.weight"] = ((q - zeros[group]) * scales[group].float()).T
        return {
            "qweight": packed_int32(q, self.bits, 0), "scales": scales,
            "qzeros": packed_int32(zeros - self.offset, self.bits), "g_idx": group.int(),
        }  # fmt: skip


class Awq:
    """AutoAWQ's `gemm`: eight columns of a group in the order 0 2 4 6 1 3 5 7."""

    def __init__(self):
        self.how = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
        self.dense = {}

    def __call__(self, name, weight):
        d_out, d_in = weight.shape
        q, zeros = drawn(name, d_in, d_out), drawn(name + "z", d_in // 16, d_out)
        scales = (drawn(name + "s", d_in // 16, d_out, most=100) / 997 + 0.01).half()
        rows = torch.arange(d_in) // 16
        self.dense[f"{name}.weight"] = ((q - zeros[rows]) * scales[rows].float()).T

        def pack(codes):
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            eights = codes.reshape(len(codes), -1, 8)[:, :, order]
            return packed_int32(eights.reshape(codes.shape), 4)

        return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}


class Float8:
    """Float8 with a scale for each block of 12 by 20, which do not fit evenly."""

    def __init__(self):
        self.how = {"quant_method": "fp8", "weight_block_size": [12, 20]}
        self.dense = {}

    def __call__(self, name, weight):
        d_out, d_in = weight.shape
        scale = drawn(name, -(-d_out // 12), -(-d_in // 20), least=1, most=9) / 64
        q = (weight * 100).to(torch.float8_e4m3fn)
        every = torch.tensor([[scale[i // 12, j // 20] for j in range(d_in)] for i in range(d_out)])
        self.dense[f"{name}.weight"] = q.float() * every
        return {"weight": q, "weight_scale_inv": scale}


LAYOUTS = {
    "gptq 4": lambda: Gptq(4, 1), "gptq 8": lambda: Gptq(8, 1), "gptq v2": lambda: Gptq(4, 0),
    "awq": Awq, "fp8": Float8,
}  # fmt: skip


def adapters(tmp_path, base):
    config = {"target_modules": ["q_proj"], "base_name": str(base)}
    return [save_adapter(tmp_path / str(s), llama, s, **config) for s in (1, 2)]


def expected_sum(dense, folders, weights):
    total = dict(dense)
    for folder, weight in zip(folders, weights, strict=True):
        for name, factors in read_adapter(folder).layers.items():
            total[f"{name}.weight"] = total[f"{name}.weight"] + weight * factors.delta()
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merge_onto_a_packed_base_is_the_sum(layout, tmp_path):
    pack = LAYOUTS[layout]()
    base = base_of(tmp_path / "base", pack.how, pack)
    found = weights_of(base)
    assert found.keys() == pack.dense.keys()
    for key, weight in pack.dense.items():
        torch.testing.assert_close(found[key], weight)
    folders = adapters(tmp_path, base)
    merge_to_model(folders, tmp_path / "out", weights=[0.7, -0.4])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, weight in expected_sum(pack.dense, folders, [0.7, -0.4]).items():
        torch.testing.assert_close(merged[key], weight.bfloat16(), atol=1e-6, rtol=8e-3)
    model = type(llama()).from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    with pytest.raises(AdapterError, match="requantize"):
        merge_to_model(folders, tmp_path / "again", requantize=True)


def test_what_is_not_read_is_named(tmp_path):
    base = base_of(tmp_path / "base", {"quant_method": "gptq", "bits": 3}, Gptq(4, 1))
    folders = adapters(tmp_path, base)
    for how, word in (
        ({"quant_method": "gptq", "bits": 3}, "gptq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq, marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "fp8"}, "fp8"),
    ):
        config = json.loads((base / "config.json").read_text()) | {"quantization_config": how}
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError) as caught:
            merge_to_model(folders, tmp_path / "out")
        assert all(w in str(caught.value) for w in (word, str(base), "--base"))
    tensors = load_file(base / "model.safetensors")
    tensors.pop(f"{NAMES[0]}.scales")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="lacks"):
        merge_to_model(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nf4(kind, nested):
    """bitsandbytes' own 4 bits, as Transformers saves them."""
    functional = pytest.importorskip("bitsandbytes").functional

    def pack(name, weight):
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        return {"weight": codes} | {
            f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
        }

    return pack


def int8(name, weight):
    """bitsandbytes' own 8 bits, as Transformers saves them."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32"}  # fmt: skip
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BITS = {
    "nf4": (FOUR, lambda: nf4("nf4", False)), "nf4 nested": (FOUR, lambda: nf4("nf4", True)),
    "fp4": (FOUR | {"bnb_4bit_quant_type": "fp4"}, lambda: nf4("fp4", False)),
    "int8": (EIGHT, lambda: int8),
}  # fmt: skip


def by_bitsandbytes(folder):
    """The packed weights of a folder as bitsandbytes' own functions read them."""
    functional = pytest.importorskip("bitsandbytes").functional
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in NAMES:
        own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(name)}
        codes = own.pop("weight")
        if "SCB" in own:
            weight = functional.int8_vectorwise_dequant(codes, own["SCB"])
        else:
            state = functional.QuantState.from_dict(
                {k.removeprefix("weight."): t for k, t in own.items()}, device="cpu"
            )
            weight = functional.dequantize_4bit(codes, state)
        found[f"{name}.weight"] = weight.float()
    return found


@pytest.mark.parametrize("kind", BITS)
def test_bitsandbytes_reads_the_same(kind, tmp_path):
    how, pack = BITS[kind]
    base = base_of(tmp_path / "base", how, pack())
    theirs = by_bitsandbytes(base)
    found = weights_of(base)
    assert found.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(found[key], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", BITS)
def test_a_merge_quantized_again_is_what_bitsandbytes_makes_of_the_sum(kind, tmp_path):
    how, pack = BITS[kind]
    base = base_of(tmp_path / "base", how, pack(), dtype="float32")
    folders = adapters(tmp_path, base)
    merge_to_model(folders, tmp_path / "out", weights=[0.7, -0.4], requantize=True)
    total = expected_sum(by_bitsandbytes(base), folders, [0.7, -0.4])
    found = by_bitsandbytes(tmp_path / "out")
    errors = json.loads((tmp_path / "out" / "merge.json").read_text())["quantization_error"]
    assert set(errors) == {name for name in NAMES if name.endswith("q_proj")}
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    for name in NAMES:
        key = f"{name}.weight"
        if name in errors:
            lost = (found[key] - total[key]).norm() / total[key].norm()
            assert errors[name] == pytest.approx(float(lost), rel=1e-3)
            assert 0 < errors[name] < (0.02 if kind == "int8" else 0.2)
        else:
            assert torch.equal(before[key], after[key])
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == how
    checks = verify(tmp_path / "out", redo=True)
    assert {check.state for check in checks} == {"same"}


def test_transformers_loads_the_model_that_was_quantized_again(tmp_path):
    pytest.importorskip("bitsandbytes")
    pack = nf4("nf4", False)
    base = base_of(tmp_path / "base", FOUR, pack, dtype="float32")
    merge_to_model(adapters(tmp_path, base), tmp_path / "out", requantize=True)
    for folder in (base, tmp_path / "out"):
        config = json.loads((folder / "config.json").read_text())
        skipped = [n for n, _ in llama().named_modules() if "proj" in n and n not in NAMES]
        config["quantization_config"]["llm_int8_skip_modules"] = [*skipped, "lm_head"]
        (folder / "config.json").write_text(json.dumps(config))
    model = type(llama()).from_pretrained(tmp_path / "out").eval()
    plain = llama().eval()
    weights = by_bitsandbytes(tmp_path / "out")
    plain.load_state_dict(weights, strict=False)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            model(input_ids=ids).logits.float(), plain(input_ids=ids).logits, atol=2e-3, rtol=1e-2
        )


COMPRESSED = {
    "packed by group": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16,
                         "symmetric": True}, "pack-quantized"),
    "packed, with zeros": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16,
                            "symmetric": False}, "pack-quantized"),
    "int8 by row": ({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
                    "int-quantized"),
    "float8 by row": ({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                      "float-quantized"),
    "float8 by tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
                         "float-quantized"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind, tmp_path):
    """The layout by hand; and that integers are packed as the package packs them, if it is here."""
    weights, form = COMPRESSED[kind]
    dense = {}

    def pack(name, weight):
        d_out, d_in = weight.shape
        groups = {"group": d_in // 16, "channel": 1}.get(weights["strategy"], 0)
        scale = drawn(name + "s", d_out, groups or 1, least=1, most=99) / 997
        scale = scale if groups else scale[0]
        every = scale.repeat_interleave(d_in // (groups or 1), dim=1) if groups else scale
        if form == "float-quantized":
            q = (weight * 100).to(torch.float8_e4m3fn)
            dense[f"{name}.weight"] = q.float() * every
            return {"weight": q, "weight_scale": scale}
        most = 2 ** (weights["num_bits"] - 1)
        q = drawn(name, d_out, d_in, least=-most, most=most)
        if form == "int-quantized":
            dense[f"{name}.weight"] = q * every
            return {"weight": q.to(torch.int8), "weight_scale": scale}
        found = {"weight_packed": packed_int32(q + most, 4), "weight_scale": scale,
                 "weight_shape": torch.tensor(weight.shape)}  # fmt: skip
        zero = torch.zeros(d_out, groups, dtype=torch.long)
        if not weights["symmetric"]:
            zero = drawn(name + "z", d_out, groups, least=-most, most=most)
            found["weight_zero_point"] = packed_int32(zero + most, 4, 0)
        dense[f"{name}.weight"] = (q - zero.repeat_interleave(16, dim=1)) * every
        return found

    group = {"targets": ["Linear"], "weights": weights}
    how = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": group}}
    base = base_of(tmp_path / "base", how, pack)
    for key, weight in weights_of(base).items():
        torch.testing.assert_close(weight, dense[key].float())


def test_integers_are_packed_as_compressed_tensors_does():
    module = pytest.importorskip("compressed_tensors.compressors")
    q = drawn("x", 8, 32, least=-8, most=8)
    theirs = module.pack_to_int32(q.to(torch.int8), 4)
    assert torch.equal(packed_int32(q + 8, 4), theirs)


def test_dora_on_a_quantized_base(tmp_path):
    pack = Gptq(4, 1)
    base = base_of(tmp_path / "base", pack.how, pack)
    folder = save_adapter(tmp_path / "d", llama, 1, base_name=str(base), use_dora=True,
                          target_modules=["q_proj"])  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, found in read_adapter(folder).layers.items():
        stem = f"base_model.model.{name}.lora_"
        W = pack.dense[f"{name}.weight"]
        moved = W + 2 * tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        scale = tensors[f"{stem}magnitude_vector"] / moved.norm(dim=1)
        torch.testing.assert_close(found.delta(), scale[:, None] * moved - W, atol=1e-5, rtol=1e-4)

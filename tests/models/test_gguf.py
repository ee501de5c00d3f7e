"""GGUF files as bases: what is written is what the file holds, and it is kept under its hash."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, call
from safetensors.torch import load_file

from orthomerge.errors import AssetError
from orthomerge.models import gguf as ours
from orthomerge.models import packaged
from orthomerge.models.assets import is_local, resolve_model
from orthomerge.models.loading import load_language_model, load_tokenizer
from orthomerge.models.packaged import Packaged, Wheel

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KV, FF, LAYERS = 64, 4, 2, 96, 2


def write_gguf(path: Path, kind: str = "Q8_0", seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny Llama in a GGUF file; the weights as they can be read back, by GGUF's names."""
    letters = sorted({letter for word in WORDS for letter in word} | {"Ġ"})
    tokens = ["<unk>", "<s>", "</s>", *letters, *dict.fromkeys(a + b for a, b in _merges())]
    draw, quantised = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{a} {b}" for a, b in _merges()])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH)}
    kv = KV * WIDTH // HEADS
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_k": (kv, WIDTH),
            f"blk.{i}.attn_v": (kv, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (FF, WIDTH), f"blk.{i}.ffn_up": (FF, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, FF),
        }  # fmt: skip
    held = {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(draw.normal(0, 0.1, shape).astype(np.float32), quantised)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=quantised)
        held[f"{name}.weight"] = gguf.quants.dequantize(packed, quantised)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _merges() -> list[tuple[str, str]]:
    """Merges that build every word, with and without a space before it, letter by letter."""
    found = []
    for word in [*(f"Ġ{word}" for word in WORDS), *WORDS]:
        for end in range(1, len(word)):
            found.append((word[:end], word[end]))
    return list(dict.fromkeys(found))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ORTHOMERGE_CACHE", str(folder))
    ours._said.clear()
    return folder


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_the_weights_are_those_of_the_file(tmp_path, kind):
    held = write_gguf(tmp_path / "tiny.gguf", kind)
    found = resolve_model(str(tmp_path / "tiny.gguf"))
    assert (found.source, found.name) == ("path", str(tmp_path / "tiny.gguf"))
    weights = load_file(Path(found.path_or_id) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for theirs, name in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
    ):
        assert torch.equal(weights[f"{name}.weight"], torch.from_numpy(held[f"{theirs}.weight"]))
    config = json.loads((Path(found.path_or_id) / "config.json").read_text())
    assert "quantization_config" not in config and config["num_key_value_heads"] == KV
    tokenizer = load_tokenizer(found.path_or_id)
    assert tokenizer.tokenize("the good film") == ["the", "Ġgood", "Ġfilm"]
    model = load_language_model(found.path_or_id)
    assert torch.isfinite(model(**tokenizer(["the film"], return_tensors="pt")).logits).all()


def test_it_is_dequantised_once_and_said(tmp_path, cache, monkeypatch, caplog):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    assert is_local(str(file)) and not is_local(str(tmp_path / "other.gguf"))
    with pytest.raises(AssetError, match="not dequantised on this machine"):
        resolve_model(str(file), fetch=False)
    with caplog.at_level(logging.INFO, logger="orthomerge"):
        found = resolve_model(str(file))
    assert "tiny.gguf: weights dequantised from Q8_0 to float32" in caplog.text
    monkeypatch.setattr(ours, "_convert", None)
    assert resolve_model(str(file), fetch=False) == found
    # The folder itself, named as a base, is the same model.
    assert resolve_model(found.path_or_id).sha256 == found.sha256
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(file.read_bytes())
    assert resolve_model(str(copy)).sha256 == found.sha256
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == [
        Path(found.path_or_id).name
    ]


def test_another_file_is_another_model(tmp_path):
    write_gguf(tmp_path / "a.gguf", seed=0)
    write_gguf(tmp_path / "b.gguf", seed=1)
    one, other = (resolve_model(str(tmp_path / f"{name}.gguf")) for name in "ab")
    assert one.sha256 != other.sha256 and one.path_or_id != other.path_or_id


def test_a_dequantised_folder_that_changed_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    folder = Path(resolve_model(str(tmp_path / "tiny.gguf")).path_or_id)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(AssetError, match=r"'model\.safetensors'.*delete the folder"):
        resolve_model(str(tmp_path / "tiny.gguf"))
    (folder / ours.RECORD).write_text("[]")
    with pytest.raises(AssetError, match=r"dequantised\.json' cannot be read"):
        resolve_model(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"something else" * 99])
def test_what_is_no_gguf_file_leaves_nothing(tmp_path, cache, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(AssetError, match="cannot be read as a GGUF file") as caught:
        resolve_model(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)
    assert all(p.name.startswith(".") for p in cache.iterdir())


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip install 'orthomerge\[gguf\]'"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def test_a_missing_file_and_a_folder_with_nothing_but_one(tmp_path):
    with pytest.raises(AssetError, match="there is no file of that name"):
        resolve_model("nowhere.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    with pytest.raises(AssetError, match=r"name the file '.*tiny\.gguf'"):
        resolve_model(str(folder))


def test_a_package_that_carries_a_gguf_file(tmp_path, cache, monkeypatch):
    from test_assets import make_wheel

    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    file = "tiny_llama-1.0-py3-none-any.whl"
    cache.mkdir()
    sha256 = make_wheel(cache / file, {"tiny_llama/tiny.gguf": content})
    record = Packaged(
        wheels=(Wheel("tiny-llama", "1.0", file, sha256, len(content)),),
        folder="tiny_llama", licence="mit", ids=("tiny-llama",), gguf="tiny.gguf",
        files={"tiny.gguf": ours.file_sha256(tmp_path / "tiny.gguf")},
    )  # fmt: skip
    monkeypatch.setattr(packaged, "PACKAGED", (record,))
    with pytest.raises(AssetError, match="not dequantised"):
        resolve_model("tiny-llama", fetch=False)
    found = resolve_model("tiny-llama")
    assert (found.source, found.name) == ("package", "tiny-llama")
    assert found.path_or_id == str(cache / "tiny-llama-1.0")
    assert found.sha256 == resolve_model(str(tmp_path / "tiny.gguf")).sha256
    assert resolve_model("tiny-llama", fetch=False) == found
    assert not list(cache.glob(".unpack-*"))


def test_a_base_on_the_command_line(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "texts.jsonl").write_text('{"text": "the good film"}\n{"text": "a bad film"}\n')
    said = call(
        "stats", tmp_path / "tiny.gguf", "--data", tmp_path / "texts.jsonl",
        "--targets", "q_proj,v_proj", "--output", tmp_path / "a.stats.safetensors",
    )  # fmt: skip
    assert "2 distinct inputs of 4 layers" in said

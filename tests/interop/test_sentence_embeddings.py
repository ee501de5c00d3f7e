"""sentence-transformers: adapters of an embedding model, merged and loaded again by it."""

from __future__ import annotations

import pytest
import torch
from conftest import call, make_texts, tiny_bert
from torch import nn

from orthomerge.adapters import read_adapter
from orthomerge.evaluation.classification import applied

embeddings = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    """A folder as sentence-transformers writes it."""
    folder = tmp_path_factory.mktemp("embedding")
    tiny_bert().bert.save_pretrained(folder / "bert")
    tiny_tokenizer.save_pretrained(folder / "bert")
    body = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(body.get_embedding_dimension(), "mean")
    model = embeddings.SentenceTransformer(modules=[body, pooling], device="cpu")
    model.save_pretrained(str(folder / "base"), create_model_card=False)
    return folder / "base"


def load(base):
    return embeddings.SentenceTransformer(str(base), device="cpu")


def test_feature_extraction_adapters_merge_and_load_again(base, tmp_path):
    for seed, name in enumerate("ab"):
        model = load(base)
        lora = peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=2, lora_alpha=4, target_modules=["query", "value"]
        )
        model.add_adapter(lora)
        torch.manual_seed(seed)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(weight, std=0.4)
        model[0].auto_model.save_pretrained(str(tmp_path / name))
    call("merge", tmp_path / "a", tmp_path / "b", "--weights", 1, "--base", base,
         "--output", tmp_path / "merged")  # fmt: skip

    texts = make_texts(12)
    alone = [read_adapter(tmp_path / n).layers for n in "ab"]
    assert [len(layers) for layers in alone] == [4, 4]
    plain = load(base)
    untouched = plain.encode(texts)
    with applied(plain[0].auto_model, {n: sum(a[n].delta() for a in alone) for n in alone[0]}):
        right = plain.encode(texts)
    assert abs(right - untouched).max() > 0.05

    merged = load(base)
    merged.load_adapter(str(tmp_path / "merged"))
    assert merged.encode(texts) == pytest.approx(right, abs=2e-5)
    assert merged.similarity(merged.encode(texts), merged.encode(texts)).shape == (12, 12)

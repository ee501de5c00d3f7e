"""Fisher information against autograd a sample at a time, and the file that carries it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import WORDS, make_texts, tiny_bert
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.fisher import FisherMeta, collect_fisher, load_fisher, save_fisher

META = FisherMeta("tiny", "a" * 64, "some", 5, model_sha256="b" * 64)
QUERY = "bert.encoder.layer.0.attention.self.query"


def tiny_gpt2(labels: int) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=5 + len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32,
        num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def batches(tokenizer, size: int = 2, count: int = 3):
    texts = make_texts(count, 4)
    return [
        dict(tokenizer(texts[i : i + size], padding=True, return_tensors="pt"))
        for i in range(0, count, size)
    ]


def one_at_a_time(model, batches, layers, *, regression=False):
    """The definition: a backward pass a sample and label, straight on the weights."""
    weights = [model.get_submodule(name).weight for name in layers]
    sums = [torch.zeros_like(w) for w in weights]
    count = 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            inputs = {k: v[row : row + 1] for k, v in batch.items()}
            logits = model(**inputs).logits[0]
            heights = logits if regression else logits.log_softmax(-1)
            shares = torch.ones(1) if regression else heights.detach().exp()
            for height, share in zip(heights, shares, strict=True):
                for total, g in zip(
                    sums, torch.autograd.grad(height, weights, retain_graph=True), strict=True
                ):
                    total += share * g.square()
            count += 1
    found = {n: (s / count).detach() for n, s in zip(layers, sums, strict=True)}
    conv = {n for n in layers if type(model.get_submodule(n)).__name__ == "Conv1D"}
    return {n: v.T if n in conv else v for n, v in found.items()}


@pytest.mark.parametrize("labels", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_it_is_the_definition(tiny_tokenizer, kind, labels):
    if kind == "bert":
        model, ends = tiny_bert(labels).double(), ("query", "value", "dense")
    else:
        model, ends = tiny_gpt2(labels).double(), ("c_attn", "c_fc", "c_proj")
    layers = [n for n, m in model.named_modules() if n.endswith(ends) and hasattr(m, "weight")]
    given = batches(tiny_tokenizer)
    if kind == "gpt2":
        given = [{k: v for k, v in b.items() if k != "token_type_ids"} for b in given]
    wanted = one_at_a_time(model, given, layers, regression=labels == 1)
    model.train().requires_grad_(False)
    found = collect_fisher(model, given, layers, regression=labels == 1)
    assert model.training
    assert list(found) == layers
    for name in layers:
        assert found[name].dtype == torch.float64
        scale = float(wanted[name].max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-10 * scale)
    alone = collect_fisher(model, [{k: v[:1] for k, v in given[0].items()}], layers[:1])
    assert set(alone) == {layers[0]}


class Shared(nn.Module):
    """One layer run twice, then changed in place: its weight's gradient sums over both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(2):
            x = self.first(x).relu_()
        return type("Output", (), {"logits": self.head(x.mean(1))})


def test_a_layer_that_runs_twice_sums_before_it_squares():
    torch.manual_seed(0)
    model = Shared().double()
    with torch.no_grad():
        model.first.bias += 1
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for row in x:
        heights = model(row[None]).logits[0].log_softmax(-1)
        for height in heights:
            (g,) = torch.autograd.grad(height, [model.first.weight], retain_graph=True)
            wanted += height.detach().exp() * g.square() / 3
    found = collect_fisher(model, [{"x": x}], ["first"])["first"]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    with pytest.raises(AdapterError, match="'unused' has no part"):
        collect_fisher(model, [{"x": x}], ["unused"])


def test_mistakes_are_named_and_the_model_is_left_as_it_was(tiny_tokenizer):
    model = tiny_bert().train()
    with pytest.raises(AdapterError, match=r"no layer 'bert\.nowhere'"):
        collect_fisher(model, [], ["bert.nowhere"])
    with pytest.raises(AdapterError, match="LayerNorm"):
        collect_fisher(model, [], ["bert.embeddings.LayerNorm"])
    with pytest.raises(StatisticsError, match="no samples"):
        collect_fisher(model, [], [QUERY])
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match="not finite"):
        collect_fisher(model, batches(tiny_tokenizer), [QUERY])
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def file(tmp_path):
    value = {"b.x": torch.rand(3, 4), "a.y": torch.rand(2, 2)}
    return save_fisher(tmp_path / "f.safetensors", value, META), value


def test_a_file_gives_back_what_was_written(file, tmp_path):
    path, value = file
    found = load_fisher(path, adapter_sha256="a" * 64, model_sha256="b" * 64)
    assert found.meta == META
    assert set(found) == set(value)
    assert "nothing" not in found
    assert all(torch.equal(found[name], value[name]) for name in value)
    again = save_fisher(tmp_path / "g", dict(reversed(value.items())), replace(META))
    assert load_fisher(again).meta == META


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("absent", ["no Fisher file", "orthomerge stats fisher"]),
        ("cut", ["cannot be read", "cut"]),
        ("empty", ["cannot be read"]),
        ("altered", ["is not what was written"]),
        ("other", ["is not a Fisher file"]),
        ("adapter", ["another adapter", "aaaaaaaaaaaa"]),
        ("base", ["another base model", "bbbbbbbbbbbb"]),
    ],
)
def test_a_file_that_is_not_right_is_refused_in_a_sentence(file, harm, words):
    path, value = file
    raw = path.read_bytes()
    asked = {}
    if harm == "absent":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(raw[:-5])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "altered":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif harm == "other":
        from safetensors.torch import save_file

        save_file(value, path)
    else:
        asked = {"adapter_sha256" if harm == "adapter" else "model_sha256": "c" * 64}
    with pytest.raises(StatisticsError) as caught:
        dict(load_fisher(path, **asked))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_nothing_to_write_is_no_file(tmp_path):
    with pytest.raises(StatisticsError, match="no Fisher information"):
        save_fisher(tmp_path / "f", {}, META)
    assert not (tmp_path / "f").exists()

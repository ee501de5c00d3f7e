"""Collection on the real model classes, tiny and random, against one text at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn

from orthomerge.errors import StatisticsError
from orthomerge.statistics import backbone, collect_statistics, target_layers

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8}
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


class Family(NamedTuple):
    """A model class, its sizes, the targets, and groups of them that read one tensor a block."""

    model: str
    config: str
    sizes: dict
    targets: list[str]
    inputs: int
    shared: list[tuple[str, ...]]


LLAMA_SHARED = [
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("o_proj",),
    ("down_proj",),
]
BERT_SHARED = [
    ("self.query", "self.key", "self.value"), ("attention.output.dense",), ("intermediate.dense",),
]  # fmt: skip
FAMILIES = [
    Family("BertModel", "BertConfig", SHAPE, ["query", "key", "value", "dense"], 9, BERT_SHARED),
    Family("RobertaModel", "RobertaConfig", SHAPE, ["query", "key", "value", "dense"], 9,
           BERT_SHARED),
    Family("GPT2Model", "GPT2Config", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2},
           ["c_attn", "c_proj", "c_fc"], 8,
           [("c_attn",), ("attn.c_proj",), ("c_fc",), ("mlp.c_proj",)]),
    Family("T5Model", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"},
           ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], 21, [("wi_0", "wi_1"), ("wo",)]),
    *[
        Family(f"{name}Model", f"{name}Config", GROUPED, DECODER, 8, LLAMA_SHARED)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
    ],
]  # fmt: skip
LENGTHS = [7, 2, 5, 7, 1, 4]


def build(family: Family) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.sizes)
    return getattr(transformers, family.model)(config).double().eval()


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 50, (n,), generator=generator) for n in LENGTHS]


def padded(texts, side="right"):
    """One batch, its padding filled with a token that would change every moment."""
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), 0), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def reference(model, targets):
    """Every layer's `S` in float64, one text at a time, so that there is no padding at all."""
    rows = defaultdict(list)
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, a, name=name: rows[name].append(a[0][0].reshape(-1, a[0].shape[-1]))
        )
        for name, layer in target_layers(model, targets).items()
    ]  # fmt: skip
    for text in sequences():
        inputs = {"input_ids": text[None]}
        if hasattr(model, "_shift_right"):
            inputs["decoder_input_ids"] = model._shift_right(inputs["input_ids"])
        with torch.no_grad():
            model(**inputs)
    for handle in handles:
        handle.remove()
    return {n: (h := torch.cat(r)).T @ h / len(h) for n, r in rows.items()}


def assert_matches(found, expected, tolerance=1e-10):
    assert set(found.layers) == set(expected)
    for name, matrix in expected.items():
        error = torch.linalg.matrix_norm(found.second_moment(name) - matrix)
        assert error <= tolerance * torch.linalg.matrix_norm(matrix), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model)
def test_moments_equal_one_text_at_a_time_and_layers_share_what_they_read(family):
    model = build(family)
    texts = sequences()
    found = collect_statistics(model, [padded(texts[:4]), padded(texts[4:])], family.targets)
    assert_matches(found, reference(model, family.targets))
    assert len(found.moments) == family.inputs
    by_input = defaultdict(set)
    for layer, owner in found.layers.items():
        by_input[owner].add(layer)
    for group in family.shared:
        # q, k and v of one block and nothing else; the layer before the end names the block.
        together = [g for g in by_input.values() if any(n.endswith(group[0]) for n in g)]
        assert len(together) >= 2
        assert all(len(g) == len(group) for g in together)
        assert all(any(n.endswith(end) for n in g) for g in together for end in group)
    assert found.meta.samples == len(texts)


# Absolute positions that a model counts from the left, from the tokens or from the mask.
ABSOLUTE = [
    Family("DistilBertModel", "DistilBertConfig",
           {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
           ["q_lin", "out_lin", "lin1"], 6, []),
    Family("MPNetModel", "MPNetConfig", {**SHAPE, "pad_token_id": 1}, ["q", "dense"], 6, []),
    Family("OPTModel", "OPTConfig",
           {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 40},
           ["q_proj", "fc1"], 4, []),
    Family("BartModel", "BartConfig",
           {"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24, "max_position_embeddings": 40},
           ["fc1"], 4, []),
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, *ABSOLUTE], ids=lambda f: f.model)
def test_padding_on_the_left_changes_nothing(family):
    """Also where positions are absolute, and where both texts of a pair are padded on the left."""
    model = build(family)
    left, right = padded(sequences(), "left"), padded(sequences())
    if "Bart" in family.model:
        for batch, short in ((left, padded(sequences()[::-1], "left")),
                             (right, padded(sequences()[::-1]))):  # fmt: skip
            batch.update({f"decoder_{name}": value for name, value in short.items()})
    found, expected = (collect_statistics(model, [b], family.targets) for b in (left, right))
    for name in expected.layers:
        assert torch.equal(found.second_moment(name), expected.second_moment(name))


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "LlamaModel", "Qwen3Model"])
@pytest.mark.parametrize("said", [False, True])
def test_left_padding_is_one_text_at_a_time(name, said):
    family = next(f for f in FAMILIES if f.model == name)
    model = build(family)
    batch = padded(sequences(), "left")
    if said:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    found = collect_statistics(model, [batch], family.targets)
    assert_matches(found, reference(model, family.targets))


@pytest.mark.parametrize("granularity", ["sample", "task_mean"])
def test_t5_cross_attention_reads_the_encoder_under_its_mask(granularity):
    """Encoder and decoder are equally long here, so only the discovery can tell them apart."""
    family = next(f for f in FAMILIES if f.model == "T5Model")
    model = build(family)
    found = collect_statistics(
        model, [padded(sequences())], ["q", "k", "v"], granularity=granularity
    )
    cross = [n for n in found.layers if "EncDecAttention" in n]
    owners = {found.layers[n] for n in cross if not n.endswith(".q")}
    assert len(owners) == 1
    assert not owners & {found.layers[n] for n in found.layers if n not in cross}
    queries = {found.layers[n] for n in cross if n.endswith(".q")}
    assert len(queries) == 2
    assert not queries & owners
    states = []
    with torch.no_grad():
        for text in sequences():
            states.append(model.encoder(input_ids=text[None]).last_hidden_state[0])
    rows = torch.stack([s.mean(0) for s in states])
    if granularity == "task_mean":
        rows = torch.cat(states).mean(0, keepdim=True)
    torch.testing.assert_close(
        found.second_moment(next(iter(owners))), rows.T @ rows / len(rows), rtol=1e-9, atol=1e-12
    )


def test_t5_that_first_meets_a_single_token():
    family = next(f for f in FAMILIES if f.model == "T5Model")
    model = build(family)
    texts = sorted(sequences(), key=len)
    found = collect_statistics(model, [padded(texts[:1]), padded(texts[1:])], ["q", "k", "v"])
    assert_matches(found, reference(model, ["q", "k", "v"]))


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_vit_reads_pixels(granularity):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTModel(config).double().eval()
    ends = sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    found = collect_statistics(
        model, [{"pixel_values": images[:2]}, {"pixel_values": images[2:]}], ends,
        granularity=granularity,
    )  # fmt: skip
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _m, a, name=name: seen.update({name: a[0]}))
        for name, layer in target_layers(model, ends).items()
    ]
    with torch.no_grad():
        model(pixel_values=images)
    for handle in handles:
        handle.remove()
    for name, h in seen.items():
        rows = h.mean(1) if granularity == "sample" and h.ndim == 3 else h.reshape(-1, h.shape[-1])
        torch.testing.assert_close(found.second_moment(name), rows.T @ rows / len(rows))
    block = [
        n
        for n in found.layers
        if ".0." in n and "attention" in n and "out" not in n and "o_proj" not in n
    ]
    assert len(block) == 3
    assert len({found.layers[n] for n in block}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_short_floats_match_float64_within_their_rounding(dtype, name):
    family = next(f for f in FAMILIES if f.model == name)
    model = build(family)
    expected = reference(model, family.targets)
    found = collect_statistics(model.to(dtype), [padded(sequences())], family.targets)
    assert all(m.matrix.dtype == torch.float64 for m in found.moments.values())
    assert_matches(found, expected, tolerance=16 * torch.finfo(dtype).eps)
    assert found.meta.dtype == str(dtype).removeprefix("torch.")


class Flat(nn.Module):
    """A block that flattens positions to rows, as some feed-forward layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        flat = h.reshape(-1, 6)
        return self.second(self.first(flat)).view(h.shape)


@pytest.mark.parametrize("granularity", ["token", "sample", "task_mean"])
def test_padding_is_told_apart_in_flattened_inputs(granularity):
    model = Flat().double()
    found = collect_statistics(model, [padded(sequences())], ["first"], granularity=granularity)
    rows = [model.embed(t).detach() for t in sequences()]
    whole = torch.cat(rows)
    if granularity == "sample":
        whole = torch.stack([r.mean(0) for r in rows])
    if granularity == "task_mean":
        whole = whole.mean(0, keepdim=True)
    torch.testing.assert_close(found.second_moment("first"), whole.T @ whole / len(whole))


class InPlace(Flat):
    """The second layer reads the same memory as the first, after it was written to."""

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        y = self.first(h)
        h += y
        return self.second(h)


def test_a_tensor_written_to_in_place_is_another_input():
    model = InPlace().double()
    found = collect_statistics(model, [padded(sequences())], ["first", "second"])
    assert len(found.moments) == 2
    h = model.embed(torch.cat(sequences())).detach()
    h = h + model.first(h).detach()
    torch.testing.assert_close(found.second_moment("second"), h.T @ h / len(h))


class Odd(Flat):
    """Misbehaves in the way asked for, from the batch asked for."""

    def __init__(self, how: str, after: int) -> None:
        super().__init__()
        self.how, self.after, self.runs = how, after, 0

    def forward(self, input_ids, attention_mask=None):
        self.runs += 1
        odd = self.runs > self.after
        h = self.embed(input_ids)
        if odd and self.how == "twice":
            self.first(h)
        if odd and self.how == "fails":
            raise RuntimeError("out of luck")
        if odd and self.how == "rows":
            h = h[:, :1].expand(-1, 3, -1)
        h = self.first(h)
        return h if odd and self.how == "skips" else self.second(h)


@pytest.mark.parametrize("after", [0, 1, 2], ids=["discovery", "first batch", "later batch"])
@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("twice", StatisticsError, "layer 'first' ran twice in one forward pass"),
        ("skips", StatisticsError, "layer 'second' did not run on this data"),
        ("fails", RuntimeError, "out of luck"),
    ],
)
def test_what_goes_wrong_in_a_pass_is_said_and_leaves_no_trace(how, error, words, after):
    model = Odd(how, after).train()
    model.second.eval()
    batches = [padded(sequences()[:3]), padded(sequences()[3:])]
    with pytest.raises(error, match=words) as caught:
        collect_statistics(model, batches, ["first", "second"], task="mine")
    assert "\n" not in str(caught.value)
    if error is StatisticsError:
        assert "task 'mine'" in str(caught.value)
    assert_no_trace(model)
    assert model.training
    assert not model.second.training


def test_an_input_that_no_mask_fits_is_refused():
    model = Odd("rows", 0)
    with pytest.raises(
        StatisticsError, match=r"layer 'first' reads \[6, 3, 6\], which no attention"
    ):
        collect_statistics(model, [padded(sequences())], ["first"])
    assert_no_trace(model)


def assert_no_trace(model):
    for module in backbone(model).modules():
        for name, hooks in vars(module).items():
            if name.endswith("hooks") or "hooks_" in name:
                assert not hooks, name

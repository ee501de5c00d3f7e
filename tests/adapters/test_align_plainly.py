"""Names that need no look at a class of Transformers, which takes longer than a merge."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft_oracle import bert, gpt2, llama, save_adapter
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from orthomerge.adapters import align, align_adapters, read_adapter
from orthomerge.adapters.align import PLAIN_NAMES
from orthomerge.errors import AdapterError

TARGETS = {bert: ["query", "value"], llama: ["q_proj", "down_proj"], gpt2: ["c_attn"]}


@pytest.fixture(params=TARGETS, ids=lambda base: base.__name__)
def pair(request, tmp_path):
    base, asked = request.param, {"target_modules": TARGETS[request.param]}
    base().save_pretrained(tmp_path / "base")
    return [
        save_adapter(tmp_path / name, base, seed, base_name=str(tmp_path / "base"), **asked)
        for seed, name in enumerate("ab")
    ]


def test_no_name_of_these_was_another_in_an_older_transformers():
    for kind in PLAIN_NAMES:
        tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_NAMES")]
        found = [table[kind] for table in tables if kind in table]
        names = {n for one in found for n in ([one] if isinstance(one, str) else one)}
        assert names
        assert [n for n in (kind, *names) if get_checkpoint_conversion_mapping(n)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN_NAMES)
def test_heads_put_before_a_name_what_is_said(kind):
    headed = next(
        table[transformers.CONFIG_MAPPING[kind]]
        for table in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING)
        if transformers.CONFIG_MAPPING[kind] in table
    )
    assert headed.base_model_prefix == PLAIN_NAMES[kind]


def test_names_on_which_all_agree_are_taken_as_they_are(pair, monkeypatch):
    read = [read_adapter(folder) for folder in pair]
    by_class = align_adapters(read, base=str(pair[0].parent / "base"))
    monkeypatch.setattr(align, "_Classes", lambda *_: pytest.fail("a class was built"))
    plainly = align_adapters(read)
    assert [list(a.shapes) for a in plainly] == [list(a.shapes) for a in by_class]


def test_a_layer_that_the_base_does_not_have_is_refused_all_the_same(pair):
    for folder in pair:
        file = folder / "adapter_model.safetensors"
        changed = {k.replace(".0.", ".7."): v for k, v in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="which no model of its base"):
        align_adapters([read_adapter(folder) for folder in pair])


def test_names_that_differ_are_looked_up(pair):
    file = pair[0] / "adapter_model.safetensors"
    start = "base_model.model."
    bare = {
        start + key.removeprefix(start).partition(".")[2]: tensor
        for key, tensor in load_file(file).items()
    }
    save_file(bare, file, metadata={"format": "pt"})
    one, other = align_adapters([read_adapter(folder) for folder in pair])
    assert one.shapes == other.shapes
    name = next(iter(one.shapes))
    assert torch.equal(one.layers[name].A, read_adapter(pair[0]).layers[one.renamed[name]].A)

"""Adapters of convolutions (`Conv1d`, `Conv2d`): held to PEFT's own updates and forward pass."""

from __future__ import annotations

import pytest
import torch
from odd_adapters import by_peft, close, saved
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from orthomerge import merge_loaded_adapters
from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter
from orthomerge.errors import AdapterError
from orthomerge.merging import list_methods

PICTURES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()
SOUND = torch.linspace(-1, 1, 2 * 200).reshape(2, 200).sin()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(**sizes, **more)).eval()


def wav2vec2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    more = {"num_attention_heads": 2, "conv_dim": (8, 8), "conv_stride": (2, 2)}
    more |= {"conv_kernel": (4, 3), "num_conv_pos_embeddings": 4, "classifier_proj_size": 8}
    more |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **more)).eval()


MODELS = {
    "Conv2d": (vit, PICTURES, ["projection", "query"]),
    "Conv1d": (wav2vec2, SOUND, ["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"]),
}


@pytest.fixture(params=list(MODELS))
def made(request, tmp_path):
    """A model, its input and two adapters of it of two ranks."""
    make, inputs, targets = MODELS[request.param]
    make().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    folders = [
        saved(tmp_path / str(r), make, r, base=base, r=r, target_modules=targets) for r in (2, 3)
    ]
    return make, inputs, folders


def answers(model, inputs):
    with torch.inference_mode():
        return model(inputs).logits


def by_hand(make, folders, weights, inputs):
    """What the model answers with the weighted updates, as PEFT works each out, in its weights."""
    total = make()
    for folder, weight in zip(folders, weights, strict=True):
        model = PeftModel.from_pretrained(make(), folder)
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                update = module.get_delta_weight("default").detach()
                total.get_submodule(name).weight.data += weight * update
    return answers(total, inputs)


def test_a_merge_is_the_sum_of_peft_s_updates(made, tmp_path):
    make, inputs, folders = made
    expected = by_hand(make, folders, (0.7, -0.4), inputs)
    merge_adapters(folders, weights=[0.7, -0.4], output=tmp_path / "out")
    close(answers(by_peft(tmp_path / "out", make()), inputs), expected)
    merge_to_model(folders, tmp_path / "full", weights=[0.7, -0.4])
    close(answers(type(make()).from_pretrained(tmp_path / "full").eval(), inputs), expected)
    with pytest.raises(AssertionError):
        close(answers(make(), inputs), expected)


def test_adapters_in_a_model_merge_as_their_folders_do(made, tmp_path):
    make, inputs, folders = made
    model = PeftModel.from_pretrained(make(), folders[0], adapter_name="a").eval()
    model.load_adapter(str(folders[1]), "b")
    merge_loaded_adapters(model, ["a", "b"], "both", weights=[0.7, -0.4])
    model.set_adapter("both")
    close(answers(model, inputs), by_hand(make, folders, (0.7, -0.4), inputs))


@pytest.mark.parametrize("method", [m.name for m in list_methods() if not m.needs])
def test_every_method_that_needs_adapters_alone_writes_what_peft_reads(method, tmp_path):
    folders = [
        saved(tmp_path / str(seed), vit, seed, target_modules=["projection", "query"])
        for seed in (1, 2)
    ]
    merge_adapters(folders, method=method, output=tmp_path / "out")
    assert answers(by_peft(tmp_path / "out", vit()), PICTURES).isfinite().all()


def test_dora_on_a_convolution(tmp_path):
    vit().save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "target_modules": ["projection"], "use_dora": True}
    folders = [saved(tmp_path / str(seed), vit, seed, **options) for seed in (1, 2)]
    merge_adapters(folders[:1], weights=1.0, output=tmp_path / "out")
    mine = answers(by_peft(tmp_path / "out", vit()), PICTURES)
    close(mine, answers(by_peft(folders[0], vit()), PICTURES))


def test_what_no_product_of_matrices_is(tmp_path):
    folder = saved(tmp_path / "a", vit, 1, r=2, target_modules=["projection"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_B" in k)
    save_file(tensors | {key: tensors[key][:, :1].clone()}, file)
    with pytest.raises(AdapterError, match="a convolution in groups"):
        read_adapter(folder)
    save_file(tensors | {key: tensors[key].expand(-1, -1, 2, 2).clone()}, file)
    with pytest.raises(AdapterError, match="only linear, convolutional"):
        read_adapter(folder)

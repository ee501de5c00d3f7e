"""Files of kohya and diffusers: read, merged, converted; held to ΔW worked out from the files."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call
from diffusion_files import FLUX, MODELS, SD, SDXL, kohya, updates
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from orthomerge.adapters import convert_format, merge_adapters, merge_to_model, read_adapter, verify
from orthomerge.cli import app
from orthomerge.errors import AdapterError, MergeError, OutputError
from orthomerge.merging import list_methods


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name].double(), update.double(), atol=1e-5, rtol=1e-4)


@pytest.fixture(params=list(MODELS))
def two(request, tmp_path):
    """Two files of one model, of other ranks and alphas."""
    shapes = MODELS[request.param]
    a = kohya(tmp_path / "a.safetensors", shapes, 1, rank=2, alpha=1.0)
    b = kohya(tmp_path / "b.safetensors", shapes, 2, rank=3, alpha=None)
    return a, b


def test_what_is_read_is_the_update_of_the_file(two):
    for file in two:
        adapter = read_adapter(file)
        close({n: f.delta() for n, f in adapter.layers.items()}, updates(file))
        assert adapter.shapes == {n: f.shape for n, f in adapter.layers.items()}


def test_two_kohya_files_merge_to_a_kohya_file(two, tmp_path):
    a, b = two
    merge_adapters(two, weights=[0.7, -0.4], output=tmp_path / "m.safetensors")
    expected = {n: 0.7 * u - 0.4 * updates(b)[n] for n, u in updates(a).items()}
    close(updates(tmp_path / "m.safetensors"), expected)
    before, after = load_file(a), load_file(tmp_path / "m.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():  # convolutions keep their windows
        assert tensor.shape[2:] == after[key].shape[2:], key


def test_a_folder_has_the_record_and_is_verified(two, tmp_path):
    merge_adapters(two, method="ties", density=0.5, output=tmp_path / "out")
    checks = verify(tmp_path / "out", redo=True)
    assert {check.state for check in checks} == {"same"}
    assert {check.what for check in checks} == {"file", "input", "redo"}
    again = read_adapter(tmp_path / "out")
    assert again.form == "kohya"
    close(updates(tmp_path / "out" / "pytorch_lora_weights.safetensors"),
          {n: f.delta() for n, f in again.layers.items()})  # fmt: skip


@pytest.mark.parametrize("method", [m.name for m in list_methods() if not m.needs])
def test_every_method_that_needs_adapters_alone(method, tmp_path):
    files = [kohya(tmp_path / f"{s}.safetensors", SD, s) for s in (1, 2)]
    merged = merge_adapters(files, method=method, output=tmp_path / "out")
    found = updates(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    close(found, {n: merged.dense(n) for n in merged.layers})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_there_and_back(model, to, tmp_path):
    file = kohya(tmp_path / "a.safetensors", MODELS[model], 1)
    convert_format(file, tmp_path / "b.safetensors", to)
    convert_format(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    close(updates(tmp_path / "c.safetensors"), updates(file))
    before, after = load_file(file), load_file(tmp_path / "c.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    keys = list(load_file(tmp_path / "b.safetensors"))
    assert read_adapter(tmp_path / "b.safetensors").form == to
    assert not [k for k in keys if k.startswith("lora_")]


def test_projections_of_their_own_are_put_together(tmp_path):
    """Flux trained in diffusers has an A per projection; one may be missing."""
    stem = "transformer.transformer_blocks.0.attn"
    tensors = {}
    for i, part in enumerate(("to_q", "to_v")):
        tensors[f"{stem}.{part}.lora_A.weight"] = torch.full((2, 8), float(i + 1)) + torch.eye(2, 8)
        tensors[f"{stem}.{part}.lora_B.weight"] = torch.ones(8, 2) - torch.eye(8, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    convert_format(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    (name,) = found = updates(tmp_path / "k.safetensors")
    assert name == "lora_unet_double_blocks_0_img_attn_qkv"
    apart = updates(tmp_path / "a.safetensors")
    zero = torch.zeros(8, 8, dtype=torch.float64)
    expected = torch.cat([apart[f"{stem}.to_q"], zero, apart[f"{stem}.to_v"]])
    torch.testing.assert_close(found[name], expected)


def test_files_of_two_forms_merge_under_diffusers_names(tmp_path):
    a, b = (kohya(tmp_path / f"{s}.safetensors", SDXL, s) for s in (1, 2))
    convert_format(b, tmp_path / "b2.safetensors", "peft")
    out = tmp_path / "m.safetensors"
    merge_adapters([a, tmp_path / "b2.safetensors"], weights=[0.7, 0.4], output=out)
    convert_format(out, tmp_path / "back.safetensors", "kohya")
    expected = {n: 0.7 * u + 0.4 * updates(b)[n] for n, u in updates(a).items()}
    close(updates(tmp_path / "back.safetensors"), expected)
    assert "unet.down_blocks.1.attentions.0.proj_in.lora_A.weight" in load_file(out)


OLD = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight":
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight":
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora.down.weight":
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "unet.mid_block.attentions.0.proj_in.lora.down.weight": "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight":
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight":
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
}  # fmt: skip


def test_old_names_of_diffusers(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for key in OLD:
        tensors[key] = torch.randn(2, 8, generator=g)
        tensors[key.replace("down.weight", "up.weight")] = torch.randn(6, 2, generator=g)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert set(adapter.layers) == set(OLD.values())
    for key, name in OLD.items():
        B, A = tensors[key.replace("down.weight", "up.weight")], tensors[key]
        torch.testing.assert_close(adapter.layers[name].delta(), B @ A)


def test_the_scaling_of_diffusers_own_metadata(tmp_path):
    key = "unet.mid_block.attentions.0.proj_in.lora_{}.weight"
    tensors = {key.format("A"): torch.eye(4, 8), key.format("B"): torch.ones(8, 4)}
    for settings, scale in (
        ({"unet.r": 4, "unet.lora_alpha": 2}, 0.5),
        ({"unet.r": 4, "unet.lora_alpha": 2, "unet.use_rslora": True}, 1.0),
        ({"unet.r": 9, "unet.lora_alpha": 9, "unet.rank_pattern": {"proj_in": 4},
          "unet.alpha_pattern": {"proj_in": 12}}, 3.0),
        ({}, 1.0),
    ):  # fmt: skip
        header = {"lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors, tmp_path / "a.safetensors", header)
        (factors,) = read_adapter(tmp_path / "a.safetensors").layers.values()
        assert factors.scaling == scale


class Tree(nn.Module):
    """A model with layers of these names and shapes, and zeros for weights."""

    def __init__(self, shapes) -> None:
        super().__init__()
        for name, (d_out, d_in, *window) in shapes.items():
            *path, leaf = name.split(".")
            at: nn.Module = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            made = nn.Conv2d(d_in, d_out, tuple(window)) if window else nn.Linear(d_in, d_out)
            at.add_module(leaf, made)


def shapes_in(file, component):
    """The layers of a component of a file in PEFT's form, as its tensors say."""
    tensors = load_file(file)
    return {
        key.removeprefix(f"{component}.").removesuffix(".lora_A.weight"): (
            len(tensors[key.replace("lora_A", "lora_B")]), *tensor.shape[1:],
        )
        for key, tensor in tensors.items()
        if key.startswith(f"{component}.") and "lora_A" in key
    }  # fmt: skip


def test_peft_loads_a_folder_per_model(two, tmp_path):
    convert_format(two[0], tmp_path / "p.safetensors", "peft")
    convert_format(two[0], tmp_path / "folder", "peft")
    expected = updates(tmp_path / "p.safetensors")
    found = {}
    for part in (tmp_path / "folder").iterdir():
        model = PeftModel.from_pretrained(Tree(shapes_in(tmp_path / "p.safetensors", part.name)),
                                          part)  # fmt: skip
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                found[f"{part.name}.{name}"] = module.get_delta_weight("default").flatten(1)
    close(found, expected)


def test_a_peft_folder_of_a_unet_becomes_a_kohya_file(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    model = get_peft_model(Tree({name: (8, 8)}), config)
    model.save_pretrained(tmp_path / "unet")
    convert_format(tmp_path / "unet", tmp_path / "k.safetensors", "kohya")
    (update,) = updates(tmp_path / "k.safetensors").values()
    expected = model.get_base_model().get_submodule(name).get_delta_weight("default")
    torch.testing.assert_close(update.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_stay_and_lose_no_more_than_a_rounding(dtype, tmp_path):
    file = kohya(tmp_path / "a.safetensors", SD, 1, rank=4, alpha=0.05, dtype=dtype)
    convert_format(file, tmp_path / "b.safetensors", "peft")
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {dtype}
    convert_format(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    expected = updates(file)
    for name, update in updates(tmp_path / "c.safetensors").items():
        error = (update - expected[name]).norm() / expected[name].norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_what_all_headers_say_of_the_base_is_written(tmp_path):
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "2", "ss_v2": "False"}
    a = kohya(tmp_path / "a.safetensors", SDXL, 1, header=header)
    b = kohya(tmp_path / "b.safetensors", SDXL, 2, header=header | {"ss_v2": "x"})
    merge_adapters([a, b], output=tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        said = file.metadata()
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "ss_v2" not in said
    record = json.loads(said["orthomerge_record"])
    assert [entry["path"] for entry in record["adapters"]] == [str(a), str(b)]


def refused(words, *arguments):
    with pytest.raises((AdapterError, MergeError, OutputError)) as caught:
        merge_adapters(*arguments[:1], **arguments[1])
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".")
    for word in words:
        assert word in said, said


def test_what_is_refused(tmp_path):
    out = {"output": tmp_path / "out"}
    sd, xl, flux = (
        kohya(tmp_path / f"{i}.safetensors", MODELS[m], i) for i, m in enumerate(MODELS)
    )
    refused(["Stable Diffusion 1 or 2", "SDXL"], [sd, xl], out)
    refused(["SDXL", "Flux"], [xl, flux], out)
    tensors = load_file(sd)
    layer = "lora_unet_conv_in"
    for key, word in {
        "dora_scale": "DoRA", "lora_mid.weight": "Tucker", "hada_w1_a": "LoHa", "lokr_w1": "LoKr",
        "diff": "whole differences", "x": "no known kind",
    }.items():  # fmt: skip
        save_file(tensors | {f"{layer}.{key}": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
        refused([f"{layer}.{key}", word], [tmp_path / "odd.safetensors"], out)
    cut = {k: v for k, v in tensors.items() if k != f"{layer}.lora_up.weight"}
    save_file(cut, tmp_path / "odd.safetensors")
    refused([layer, "no lora_B"], [tmp_path / "odd.safetensors"], out)
    nan = tensors | {f"{layer}.lora_up.weight": torch.full((8, 2, 1, 1), float("nan"))}
    save_file(nan, tmp_path / "odd.safetensors")
    refused([layer, "not finite"], [tmp_path / "odd.safetensors"], out)
    endless = tensors | {f"{layer}.alpha": torch.tensor(float("inf"))}
    save_file(endless, tmp_path / "odd.safetensors")
    refused([layer, "alpha"], [tmp_path / "odd.safetensors"], out)
    refused(["one file", "folder"], [sd], {"output": tmp_path / "x.safetensors", "method": "emr"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="fuse_lora"):
        merge_to_model([sd], tmp_path / "out")
    (tmp_path / "taken.safetensors").write_bytes(sd.read_bytes())
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="there already"):
            merge_adapters([sd], output=tmp_path / "taken.safetensors", overwrite=overwrite)
    merge_adapters([sd], weights=1.0, output=tmp_path / "ours.safetensors")
    merge_adapters([sd], weights=2.0, output=tmp_path / "ours.safetensors", overwrite=True)
    with pytest.raises(AdapterError, match="merge into a folder"):
        verify(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert "orthomerge" not in file.metadata()  # which statistics files have
    with pytest.raises(OutputError, match="is the input"):
        merge_adapters([sd, xl], output=sd, overwrite=True)


def test_what_has_no_name_in_another_form(tmp_path):
    odd = kohya(tmp_path / "odd.safetensors", {"lora_unet_some_new_block_0_proj": (4, 4)}, 1)
    merge_adapters([odd, odd], output=tmp_path / "fine.safetensors")
    with pytest.raises(AdapterError, match="lora_unet_some_new_block_0_proj"):
        convert_format(odd, tmp_path / "x.safetensors", "peft")
    same = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({same.format("A"): torch.ones(2, 8), same.format("B"): torch.ones(8, 2)},
              tmp_path / "any.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match="Stable Diffusion or SDXL"):
        convert_format(tmp_path / "any.safetensors", tmp_path / "x.safetensors", "kohya")
    fused = kohya(tmp_path / "f.safetensors", {"lora_unet_single_blocks_0_linear1": (50, 8)}, 1)
    with pytest.raises(AdapterError, match="no layer of"):
        convert_format(fused, tmp_path / "x.safetensors", "peft")
    with pytest.raises(AdapterError, match="name an output that ends in"):
        convert_format(kohya(tmp_path / "sd.safetensors", SD, 1), tmp_path / "x", "kohya")
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "x").exists()


def test_the_commands(tmp_path):
    a, b = (kohya(tmp_path / f"{s}.safetensors", FLUX, s) for s in (1, 2))
    call("convert-format", a, "--to", "peft", "-o", tmp_path / "p.safetensors")
    said = call("convert-format", a, "--to", "peft", "-o", tmp_path / "p.safetensors",
                "--overwrite", "--json")  # fmt: skip
    assert json.loads(said) == {"path": str(tmp_path / "p.safetensors"), "form": "peft",
                                "layers": 17}  # fmt: skip
    call("merge", a, b, "--method", "ties", "-o", tmp_path / "m.safetensors")
    result = CliRunner().invoke(app, ["convert-format", str(a), "--to", "koyha", "-o", "x"])
    assert "kohya" in str(result.exception)
    call("resize", a, "--rank", 1, "-o", tmp_path / "small.safetensors")
    full, small = updates(a), updates(tmp_path / "small.safetensors")
    for name, update in full.items():
        U, s, Vh = torch.linalg.svd(update)
        torch.testing.assert_close(small[name], s[0] * U[:, :1] @ Vh[:1], atol=1e-5, rtol=1e-4)
    said = call("diagnose", a, b)
    assert "from the adapters alone" in said

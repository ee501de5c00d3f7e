"""What diffusers makes of kohya's files and of ours: held to each other on its own tiny models."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusion_files import FLUX, kohya, updates
from safetensors.torch import load_file

from orthomerge.adapters import convert_format, merge_adapters, read_adapter

diffusers = pytest.importorskip("diffusers")

CONV = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "in_channels": 4,
        "out_channels": 4, "cross_attention_dim": 16, "norm_num_groups": 32}  # fmt: skip


def sd():
    return diffusers.UNet2DConditionModel(
        **CONV, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def sdxl():
    return diffusers.UNet2DConditionModel(
        **CONV | {"block_out_channels": (32, 64, 64), "layers_per_block": 2},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 4, 4),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=48,
    )  # fmt: skip


PIPELINES = {"SD": (sd, "StableDiffusionLoraLoaderMixin"),
             "SDXL": (sdxl, "StableDiffusionXLLoraLoaderMixin")}  # fmt: skip


def loaded(make, mixin, file):
    """Every update that diffusers puts into its model from a file, by the layer's name."""
    import diffusers.loaders.lora_pipeline as loaders

    kind, model = getattr(loaders, mixin), make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = kind.lora_state_dict(str(file), unet_config=model.config)[:2]
        kind.load_lora_into_unet(state, network_alphas=alphas, unet=model, low_cpu_mem_usage=False)
    return {
        name: module.get_delta_weight("default_0").detach().flatten(1)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def adapted(make):
    """The shape of every weight of a model that an adapter may change, by diffusers' name."""
    return {
        name: tuple(module.weight.shape)
        for name, module in make().named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


@pytest.fixture(params=list(PIPELINES))
def kind(request, tmp_path):
    """A pipeline's model and two kohya files of all its layers, named by our own table."""
    from orthomerge.adapters import diffusion_names as names

    make, mixin = PIPELINES[request.param]
    family = names.SD if request.param == "SD" else names.SDXL
    layers = adapted(make)
    places = {n: names.kohya_place(f"unet.{n}", family) for n in layers}
    assert all(places.values()), [n for n, place in places.items() if place is None]
    shapes = {place.name: layers[n] for n, place in places.items()}
    assert len(shapes) == len(places)
    files = [kohya(tmp_path / f"{s}.safetensors", shapes, s, alpha=s / 2) for s in (1, 2)]
    return make, mixin, files


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name].double(), update.double(), atol=1e-5, rtol=1e-4)


def test_diffusers_reads_a_merge_of_kohya_files_as_the_sum(kind, tmp_path):
    make, mixin, files = kind
    a, b = (loaded(make, mixin, file) for file in files)
    assert len(a) > 30
    merge_adapters(files, weights=[0.7, -0.4], output=tmp_path / "m.safetensors")
    found = loaded(make, mixin, tmp_path / "m.safetensors")
    close(found, {n: 0.7 * a[n] - 0.4 * b[n] for n in a})


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_diffusers_reads_every_form_as_the_same(kind, to, tmp_path):
    make, mixin, (file, _) = kind
    convert_format(file, tmp_path / "b.safetensors", to)
    expected = loaded(make, mixin, file)
    close(loaded(make, mixin, tmp_path / "b.safetensors"), expected)
    ours = read_adapter(tmp_path / "b.safetensors").layers
    close({n.removeprefix("unet."): f.delta() for n, f in ours.items()}, expected)


def test_what_diffusers_makes_of_a_kohya_file_of_flux(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    # diffusers' own conversion knows the width of the real model alone for this layer.
    shapes = {n: s for n, s in FLUX.items() if "linear1" not in n and "te1" not in n}
    file = kohya(tmp_path / "a.safetensors", shapes, 1, rank=4, alpha=1.0)
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(file))
    convert_format(file, tmp_path / "b.safetensors", "peft")
    ours = updates(tmp_path / "b.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key}
    assert names == ours.keys()
    for name in names:
        update = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
        torch.testing.assert_close(ours[name].float(), update)


def test_the_modulation_at_the_end_of_flux_is_turned_as_diffusers_does(tmp_path):
    from diffusers.loaders.lora_conversion_utils import swap_scale_shift

    name = "lora_unet_final_layer_adaLN_modulation_1"
    file = kohya(tmp_path / "a.safetensors", {name: (16, 8)}, 1)
    convert_format(file, tmp_path / "b.safetensors", "peft")
    (found,) = updates(tmp_path / "b.safetensors").items()
    assert found[0] == "transformer.norm_out.linear"
    torch.testing.assert_close(found[1], swap_scale_shift(updates(file)[name]))


def test_the_real_model_of_flux_has_our_names():
    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip
    from orthomerge.adapters.diffusion_names import FLUX as family
    from orthomerge.adapters.diffusion_names import dotted, kohya_place

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            place = kohya_place(f"transformer.{name}", family)
            assert place is not None, name
            assert dotted(place.name)[place.part] == f"transformer.{name}"

"""What is at a path that is no PEFT folder, in a sentence with the way out."""

from __future__ import annotations

import re
from pathlib import Path

from orthomerge.errors import AdapterError, nearest
from orthomerge.io.names import CONFIG, INDEX, MODEL, WEIGHTS

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def no_adapter(folder: Path, source: str) -> AdapterError:
    """The error for a path without an adapter that can be read: what is there, and the way out."""
    found = _is_file(folder) if folder.is_file() else _in_folder(folder)
    return AdapterError(f"no adapter at '{source}': {found}.")


def _is_file(file: Path) -> str:
    if file.name in (CONFIG, WEIGHTS):
        return "it is a file of one; name its folder"
    if file.suffix in _PICKLES:
        return (
            "it is a pickle, which is never read; load it once with the program that wrote it and "
            "save it as a PEFT folder"
        )
    if file.suffix == ".gguf":
        return "it is a GGUF file of llama.cpp; name the PEFT folder it was converted from"
    if file.suffix == ".safetensors":
        return (
            "it is a file without a diffusion model's layers; name a folder that save_pretrained "
            "wrote"
        )
    return "it is a file; name a folder that save_pretrained wrote"


def _in_folder(folder: Path) -> str:
    if not folder.is_dir():
        return _nowhere(folder)
    names = sorted(path.name for path in folder.iterdir())
    missing = WEIGHTS if CONFIG in names else CONFIG
    below = [name for name in names if _is_adapter(folder / name)]
    if below:
        last = max(below, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [-1])
        more = f" ({len(below)} of its folders do)" if len(below) > 1 else ""
        return f"it has no {missing}, but '{folder / last}' is one{more}; name that"
    if any(_sharded(name) for name in names):
        return (
            f"it has no {missing} but shards of DeepSpeed or FSDP; put them together "
            "(zero_to_fp32.py, or 'accelerate merge-weights'), load the result in PEFT and save it "
            "with save_pretrained"
        )
    if "adapters.safetensors" in names:
        return f"it has no {missing} but MLX's adapters.safetensors; save it in PEFT's format"
    if any(name.startswith("adapter_model-0") for name in names):
        return (
            "its weights are in several files (adapter_model-0...); load it once in Transformers "
            "(load_adapter) and save it in one file"
        )
    from orthomerge.adapters.diffusion_names import is_diffusion_file

    if several := [name for name in names if is_diffusion_file(folder / name)]:
        return f"it holds several adapters of diffusion models ({', '.join(several)}); name one"
    if MODEL in names or INDEX in names:
        return (
            f"it is a whole model ({MODEL if MODEL in names else INDEX}), without {missing}; "
            "name an adapter that was trained on it"
        )
    return f"it has no {missing}"


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _sharded(name: str) -> bool:
    return (
        name == "zero_to_fp32.py"
        or name.startswith(("global_step", "pytorch_model_fsdp", "mp_rank_"))
        or name.endswith((".distcp", "_model_states.pt", "_optim_states.pt"))
    )


def _nowhere(path: Path) -> str:
    beside = path.parent
    near = (
        nearest(path.name, (p.name for p in beside.iterdir() if p.is_dir()))
        if beside.is_dir()
        else None
    )
    hint = f"; the nearest is '{beside / near}'" if near else ""
    return f"there is no folder of that name{hint}"

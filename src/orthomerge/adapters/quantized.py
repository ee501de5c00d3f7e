"""Base models whose weights are quantized: read as plain weights, a layer at a time.

A packed weight is several tensors of the checkpoint, by the method that its configuration names.
Here each becomes one tensor of floats that is worked out when it is its turn; bitsandbytes' are
packed again where that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, is_object, parse_json
from orthomerge.io.tensors import FLOATS, Held, Planned, Stored, read_tensor

Tensors = Mapping[str, Stored]
_TYPES = {"float16": "F16", "bfloat16": "BF16"}
_STATE = ".quant_state.bitsandbytes__"
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packed:
    """A quantized weight: the keys of its tensors, its shape, and how it is read as floats."""

    keys: tuple[str, ...]
    shape: tuple[int, int]
    read: Callable[[], Float[Tensor, "d_out d_in"]]


def packed_weights(
    tensors: Tensors, settings: Mapping[str, Any], base: Path | str
) -> dict[str, Packed]:
    """The quantized weights of a checkpoint by the key that each has when it is not; else empty.

    bitsandbytes (NF4, FP4, int8), GPTQ, AWQ, compressed-tensors (integers and float8) and float8
    by blocks, each as its own package reads it (`tests/adapters/test_quantized.py`).

    Raises:
        AdapterError: another method, or another layout of one of these; the message names it. A
            weight that lacks one of its tensors.
    """
    how = settings.get("quantization_config")
    if not how:
        return {}
    method = str(how.get("quant_method")) if is_object(how) else str(how)
    reader = _READERS.get(method)
    found = reader(tensors, how) if reader is not None else None
    left = tensors.keys() - {key for item in (found or {}).values() for key in item.keys}
    if found is None or any(tensors[key].dtype not in FLOATS for key in left):
        said = how.get("format") or how.get("checkpoint_format") if is_object(how) else None
        raise AdapterError(
            f"the base model '{base}' is quantized ({method}{f', {said}' if said else ''}) in a "
            "way that is not read here: name the base in 16 or 32 bits with --base (base=...), or "
            "write the merge as an adapter, which loads on either."
        )
    for key, item in found.items():
        if absent := next((k for k in item.keys if k not in tensors), None):
            raise AdapterError(
                f"the quantized weight '{key}' of '{base}' lacks '{absent}': copy the base anew."
            )
    return found


def plain_tensors(
    tensors: Tensors, packed: Mapping[str, Packed], settings: Mapping[str, Any], dtype: str = ""
) -> dict[str, Stored | Held]:
    """The checkpoint's tensors with the packed ones as floats, of the model's own 16-bit type."""
    named = str(settings.get("dtype") or settings.get("torch_dtype")).removeprefix("torch.")
    dtype = dtype or _TYPES.get(named, "BF16")
    taken = {key for item in packed.values() for key in item.keys}
    found: dict[str, Stored | Held] = {k: item for k, item in tensors.items() if k not in taken}
    return found | {key: Held(item.read, dtype, item.shape) for key, item in packed.items()}


def _bitsandbytes(tensors: Tensors, how: Mapping[str, Any]) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    for key in tensors:
        if _STATE in key:
            name = key.partition(_STATE)[0]
            state = _state_of(tensors[key])
            more = [k for k in tensors if k.startswith(f"{name}.")]
            keys = tuple(dict.fromkeys((name, f"{name}.absmax", f"{name}.quant_map", *more)))
            d_out, d_in = state["shape"]
            found[name] = Packed(keys, (d_out, d_in), partial(_four_bits, tensors, name, state))
        elif key.endswith(".SCB"):
            layer = key.removesuffix(".SCB")
            name = f"{layer}.weight"
            form = [k for k in (f"{layer}.weight_format",) if k in tensors]
            if name not in tensors:
                continue
            d_out, d_in = tensors[name].shape
            read = partial(_eight_bits, tensors, name, key)
            found[name] = Packed((name, key, *form), (d_out, d_in), read)
    return found


def _state_of(stored: Stored) -> Mapping[str, Any]:
    """What bitsandbytes says of a weight, JSON in the bytes of a tensor."""
    try:
        found = parse_json(bytes(read_tensor(stored).numpy()).decode())
        if len(found["shape"]) == 2 and found["blocksize"] > 0:
            return found
        raise ValueError("no matrix")
    except (Unreadable, ValueError, KeyError, TypeError) as problem:
        raise AdapterError(
            f"'{stored.path}' holds a state of bitsandbytes that cannot be read ({problem}): copy "
            "the base model anew."
        ) from problem


def _four_bits(tensors: Tensors, name: str, state: Mapping[str, Any]) -> Tensor:
    """`map[q] · absmax`, by blocks of values in the order of rows; absmax may be packed, too."""
    absmax = read_tensor(tensors[f"{name}.absmax"])
    if f"{name}.nested_absmax" in tensors:
        outer = read_tensor(tensors[f"{name}.nested_absmax"]).float()
        steps = read_tensor(tensors[f"{name}.nested_quant_map"]).float()[absmax.long()]
        absmax = _by_blocks(steps, outer, state["nested_blocksize"]) + state["nested_offset"]
    pairs = read_tensor(tensors[name]).flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().int()
    d_out, d_in = state["shape"]
    values = read_tensor(tensors[f"{name}.quant_map"]).float()[codes[: d_out * d_in]]
    return _by_blocks(values, absmax.float(), state["blocksize"]).reshape(d_out, d_in)


def _by_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    return values * scales.repeat_interleave(size)[: len(values)]


def _eight_bits(tensors: Tensors, name: str, scales: str) -> Tensor:
    rows = read_tensor(tensors[scales]).float() / 127
    return read_tensor(tensors[name]).float() * rows[:, None]


def _gptq(tensors: Tensors, how: Mapping[str, Any]) -> dict[str, Packed] | None:
    bits, layout = how.get("bits"), how.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2"):
        return None
    found: dict[str, Packed] = {}
    for key in tensors:
        if key.endswith(".qweight"):
            layer = key.removesuffix(".qweight")
            keys = tuple(f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
            keys += tuple(k for k in (f"{layer}.g_idx",) if k in tensors)
            rows, d_out = tensors[key].shape
            read = partial(_gptq_weight, tensors, layer, bits, int(layout == "gptq"), how)
            found[f"{layer}.weight"] = Packed(keys, (d_out, rows * 32 // bits), read)
    return found


def _gptq_weight(
    tensors: Tensors, layer: str, bits: int, offset: int, how: Mapping[str, Any]
) -> Tensor:
    """`(q - zero) · scale`, a zero and a scale for each group of inputs."""
    codes = _unpacked(read_tensor(tensors[f"{layer}.qweight"]), bits, dim=0)
    zeros = _unpacked(read_tensor(tensors[f"{layer}.qzeros"]), bits, dim=1) + offset
    scales = read_tensor(tensors[f"{layer}.scales"]).float()
    if f"{layer}.g_idx" in tensors:
        group = read_tensor(tensors[f"{layer}.g_idx"]).long()
    else:
        group = torch.arange(len(codes)) // _group_size(how, len(codes))
    return ((codes - zeros[:, : scales.shape[1]][group]) * scales[group]).T


def _awq(tensors: Tensors, how: Mapping[str, Any]) -> dict[str, Packed] | None:
    if how.get("bits") != 4 or str(how.get("version", "gemm")).lower() != "gemm":
        return None
    found: dict[str, Packed] = {}
    for key in tensors:
        if key.endswith(".qweight"):
            layer = key.removesuffix(".qweight")
            keys = tuple(f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
            d_in, columns = tensors[key].shape
            read = partial(_awq_weight, tensors, layer, how)
            found[f"{layer}.weight"] = Packed(keys, (columns * 8, d_in), read)
    return found


def _awq_weight(tensors: Tensors, layer: str, how: Mapping[str, Any]) -> Tensor:
    """`(q - zero) · scale`; each eight columns are packed in AWQ's own order."""
    place = torch.tensor(_AWQ_ORDER).argsort()

    def codes(part: str) -> Tensor:
        flat = _unpacked(read_tensor(tensors[f"{layer}.{part}"]), 4, dim=1)
        return flat.reshape(len(flat), -1, 8)[:, :, place].reshape(flat.shape)

    q, zeros = codes("qweight"), codes("qzeros")
    group = torch.arange(len(q)) // _group_size(how, len(q))
    scales = read_tensor(tensors[f"{layer}.scales"]).float()
    return ((q - zeros[group]) * scales[group]).T


def _group_size(how: Mapping[str, Any], d_in: int) -> int:
    size = how.get("group_size", 128)
    return size if isinstance(size, int) and size > 0 else d_in


def _compressed(tensors: Tensors, how: Mapping[str, Any]) -> dict[str, Packed] | None:
    """compressed-tensors: integers packed or whole, and float8, with one set of settings."""
    groups = how.get("config_groups")
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    if not is_object(groups) or len(groups) != 1 or how.get("format") not in known:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if is_object(group) else None
    if not is_object(weights) or weights.get("num_bits") not in (4, 8):
        return None
    found: dict[str, Packed] = {}
    for key in tensors:
        layer, _, leaf = key.rpartition(".")
        if leaf != "weight_scale":
            continue
        whole, shape = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_shape")
        if whole is not None:
            d_out, d_in = whole.shape
        elif shape is not None and f"{layer}.weight_packed" in tensors:
            d_out, d_in = (int(size) for size in read_tensor(shape))
        else:
            continue
        beside = ("weight_", "input_", "output_")
        keys = tuple(
            k
            for k in tensors
            if k == f"{layer}.weight" or k.startswith(tuple(f"{layer}.{b}" for b in beside))
        )
        read = partial(_compressed_weight, tensors, layer, weights, (d_out, d_in))
        found[f"{layer}.weight"] = Packed(keys, (d_out, d_in), read)
    return found


def _compressed_weight(
    tensors: Tensors, layer: str, weights: Mapping[str, Any], shape: tuple[int, int]
) -> Tensor:
    """`(q - zero) · scale`, a scale for the weight, a row, a group of a row's inputs or a block."""
    bits, stored = weights["num_bits"], tensors.get(f"{layer}.weight_packed")
    half = 2 ** (bits - 1)
    if stored is not None:
        q = _unpacked(read_tensor(stored), bits, dim=1)[:, : shape[1]] - half
    else:
        q = _floats(tensors[f"{layer}.weight"])
    scale = read_tensor(tensors[f"{layer}.weight_scale"]).float()
    zero = torch.zeros(())
    if f"{layer}.weight_zero_point" in tensors:
        zero = read_tensor(tensors[f"{layer}.weight_zero_point"])
        if stored is not None:
            zero = _unpacked(zero, bits, dim=0)[: len(scale)] - half
        zero = zero.float()
    group = None
    if f"{layer}.weight_g_idx" in tensors:
        group = read_tensor(tensors[f"{layer}.weight_g_idx"]).long()
    block = weights.get("block_structure")

    def spread(values: Tensor) -> Tensor:
        if values.ndim < 2 or group is None or not bool((group >= 0).all()):
            return _spread(values, shape, block)
        return values[:, group]

    return (q.float() - spread(zero)) * spread(scale)


def _fp8(tensors: Tensors, how: Mapping[str, Any]) -> dict[str, Packed] | None:
    block, end = how.get("weight_block_size") or (128, 128), ".weight_scale_inv"
    found: dict[str, Packed] = {}
    for key in tensors:
        if key.endswith(end):
            name = f"{key.removesuffix(end)}.weight"
            if name not in tensors:
                continue
            d_out, d_in = tensors[name].shape
            read = partial(_fp8_weight, tensors, name, key, block)
            found[name] = Packed((name, key), (d_out, d_in), read)
    return found


def _fp8_weight(tensors: Tensors, name: str, scale: str, block: Sequence[int]) -> Tensor:
    q = _floats(tensors[name])
    return q * _spread(read_tensor(tensors[scale]).float(), (q.shape[0], q.shape[1]), block)


def _floats(stored: Stored) -> Tensor:
    """A tensor of whole numbers or of float8 in float32."""
    if stored.dtype == "F8_E4M3":
        return read_tensor(replace(stored, dtype="U8")).view(torch.float8_e4m3fn).float()
    return read_tensor(stored).float()


def _spread(values: Tensor, shape: tuple[int, int], block: Sequence[int] | None) -> Tensor:
    """Scales for every entry of a weight: of its tensor, rows, groups of inputs, or blocks."""
    if values.numel() == 1:
        return values.reshape(())
    if values.ndim == 1:
        return values[:, None]
    rows, columns = block or (shape[0] // values.shape[0], shape[1] // values.shape[1])
    wide = values.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    return wide[: shape[0], : shape[1]]


def _unpacked(packed: Int[Tensor, "rows columns"], bits: int, dim: int) -> Tensor:
    """Codes of `bits` bits out of whole numbers of 32, the lowest bits first, along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    if dim == 0:
        return ((packed[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
    return ((packed[:, :, None] >> shifts) & mask).flatten(1)


_READERS: dict[str, Callable[[Tensors, Mapping[str, Any]], dict[str, Packed] | None]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}


def require_repackable(settings: Mapping[str, Any], base: Path | str) -> None:
    """Refuse to quantize anew what bitsandbytes did not quantize.

    Raises:
        AdapterError: the base is not quantized, or by another method.
    """
    how = settings.get("quantization_config")
    if not is_object(how) or how.get("quant_method") != "bitsandbytes":
        raise AdapterError(
            f"the base model '{base}' is not quantized by bitsandbytes, so the merge is not "
            "quantized as it is: leave out --requantize (requantize=True), and quantize the "
            "merged model with its own program."
        )


def packed_again(
    key: str,
    sum_of: Planned,
    packed: Packed,
    tensors: Tensors,
    tell: Callable[[float], None] | None,
) -> dict[str, Planned]:
    """A sum in float32 quantized as bitsandbytes quantized the base's weight.

    A weight that nothing was added to, for which there is no `tell`, is copied as it is. 4 bits:
    the nearest value of the base's own map times the largest magnitude of each block, which is kept
    in float32; 8 bits: rows over their largest magnitude. `tell` is given the relative error
    `‖Q(W) - W‖_F / ‖W‖_F` when the layer is written.
    """

    def dense() -> Tensor:
        data = b"".join(bytes(chunk) for chunk in sum_of.chunks())
        return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(sum_of.shape)

    if tell is None:
        return {k: Planned.copy(tensors[k]) for k in packed.keys}
    d_out, d_in = packed.shape
    state_key = next((k for k in packed.keys if _STATE in k), None)
    if state_key is None:
        scales = key.removesuffix("weight") + "SCB"

        def by_rows(part: int) -> Iterable[Any]:
            weight = dense()
            largest = weight.abs().amax(dim=1)
            codes = (weight * 127 / largest.clamp(min=1e-30)[:, None]).round().to(torch.int8)
            if part == 0:
                tell(_error(codes.float() * (largest / 127)[:, None], weight))
            yield _bytes((codes, largest)[part])

        made = {
            key: Planned("I8", (d_out, d_in), d_out * d_in, partial(by_rows, 0)),
            scales: Planned("F32", (d_out,), 4 * d_out, partial(by_rows, 1)),
        }
        return made | {k: Planned.copy(tensors[k]) for k in packed.keys if k not in made}
    state = dict(_state_of(tensors[state_key]))
    size, count = state["blocksize"], d_out * d_in
    values = read_tensor(tensors[f"{key}.quant_map"]).float()
    for nested in [k for k in state if k.startswith("nested_")]:
        del state[nested]
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    blocks = -(-count // size)

    def by_blocks(part: int) -> Iterable[Any]:
        weight = dense()
        flat = torch.nn.functional.pad(weight.flatten(), (0, blocks * size - count))
        absmax = flat.reshape(blocks, size).abs().amax(dim=1)
        if part == 1:
            yield _bytes(absmax)
            return
        codes = _nearest(_by_blocks(flat, 1 / absmax.clamp(min=1e-30), size), values)[:count]
        tell(_error(_by_blocks(values[codes.int()], absmax, size), weight.flatten()))
        even = torch.nn.functional.pad(codes, (0, count % 2)).reshape(-1, 2)
        yield _bytes((even[:, 0] << 4) | even[:, 1])

    half = -(-count // 2)
    return {
        key: Planned("U8", (half, 1), half, partial(by_blocks, 0)),
        f"{key}.absmax": Planned("F32", (blocks,), 4 * blocks, partial(by_blocks, 1)),
        f"{key}.quant_map": Planned.tensor(values),
        state_key: Planned.tensor(text),
    }


def _nearest(values: Float[Tensor, " n"], steps: Float[Tensor, " k"]) -> Tensor:
    """The place of the nearest of some steps, in whatever order they are."""
    ordered, place = steps.sort()
    between = (ordered[1:] + ordered[:-1]) / 2
    return place[torch.bucketize(values, between)].to(torch.uint8)


def _error(found: Tensor, weight: Tensor) -> float:
    norm = float(linalg.vector_norm(weight))
    return float(linalg.vector_norm(found - weight)) / norm if norm else 0.0


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Adapters written as ordinary PEFT folders, a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from orthomerge.adapters.base import dense_factors
from orthomerge.adapters.diffusion import keys_of
from orthomerge.adapters.experts import expert_layers, packed, place_of, wrapped_name
from orthomerge.adapters.keys import PREFIX, Key
from orthomerge.adapters.peft_config import config_text
from orthomerge.factors import LoraFactors
from orthomerge.io.files import slug
from orthomerge.io.names import CONFIG, DIFFUSION, HEAD, HEADS, WEIGHTS
from orthomerge.io.tensors import (
    Held,
    Planned,
    Stored,
    TensorWriter,
    open_tensors,
    read_tensor,
    write_tensors,
)

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Frame:
    """What an adapter is beside its factors.

    `revision` is the base model's; `targets` and `target_parameters` are PEFT's own, None for the
    full names of the layers and of `parameters`, the tensors of experts with the number of those;
    `embeddings` are the layers that are embeddings; `kernels` the window of those that are
    convolutions; `biases` what `lora_bias` adds to a layer's output; `modules` the weights of
    `modules_to_save`, by name, and `copies` the base's own embeddings where tokens were added;
    `form` is that of a diffusion model's file, and `header` what its header says.
    """

    base_model: str | None
    revision: str | None = None
    targets: list[str] | None = None
    target_parameters: list[str] | None = None
    parameters: Mapping[str, int] = field(default_factory=dict[str, int])
    embeddings: frozenset[str] = frozenset()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    modules: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    copies: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    transposed: bool = False
    form: str | None = None
    header: Mapping[str, str] = field(default_factory=dict[str, str])


def as_factors(update: LoraFactors | Tensor) -> LoraFactors:
    """A merged layer as factors, exactly; a dense one beside an identity.

    Factors of more than full rank, or of none, become those of full rank, or of rank 1: PEFT takes
    no others.
    """
    if isinstance(update, Tensor):
        return dense_factors(update)
    if update.rank > min(update.shape):
        return dense_factors(update.delta())
    if update.rank == 0:
        d_out, d_in = update.shape
        return LoraFactors(update.A.new_zeros(1, d_in), update.B.new_zeros(d_out, 1))
    return update


class AdapterWriter:
    """A PEFT folder in the making, or one with a diffusion model's file: add every layer.

    The scaling goes into B (alpha = r). Ranks may differ by layer (`rank_pattern`). `names` are
    the layers that will be added.
    """

    def __init__(self, folder: Path, names: Collection[str], frame: Frame) -> None:
        self._folder, self._frame = folder, frame
        self._layers = WrittenLayers(frame)
        folder.mkdir(parents=True)
        self._whole = whole_keys(set(names), frame)
        targets = dict.fromkeys(target_of(name, frame) for name in names)
        announced = [key for name in targets for key in _keys(name, frame)] + [*self._whole]
        metadata = {"format": "pt", **frame.header}
        self._file = TensorWriter(folder / weights_file(frame), announced, metadata)

    def __enter__(self) -> AdapterWriter:
        return self

    def add(self, name: str, update: LoraFactors | Tensor) -> None:
        """Write one layer."""
        for key, tensor in self._layers.add(name, as_factors(update)).items():
            self._file.add(key, tensor)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if problem is not None:
            self._file.__exit__(kind, problem, trace)
            return
        with self._file:
            for key, (tensors, name) in self._whole.items():
                self._file.add(key, tensors[name])
        if self._frame.form:
            return
        self._even_experts()
        text = config_text(lora_settings(self._layers.ranks, self._frame))
        (self._folder / CONFIG).write_text(text, encoding="utf-8")

    def _even_experts(self) -> None:
        """Give the experts of all layers one rank, by rows and columns of zeros.

        Transformers 5 keeps the experts of a layer as one tensor, and PEFT reads adapters of single
        experts into it only if they all have the configuration's own rank.
        """
        ranks = self._layers.ranks
        experts = [name for name in ranks if _EXPERT.search(name)]
        rank = max((ranks[name] for name in experts), default=0)
        odd = [name for name in experts if ranks[name] != rank]
        if not odd:
            return
        file = self._folder / WEIGHTS
        wider = {key: i for name in odd for i, key in enumerate(_keys(name, self._frame)[:2])}
        planned = {
            key: _padded(item, rank, wider[key]) if key in wider else Planned.copy(item)
            for key, item in open_tensors(file).items()
        }
        write_tensors(file.with_suffix(".part"), planned)
        file.with_suffix(".part").replace(file)
        ranks.update(dict.fromkeys(odd, rank))


def _padded(item: Stored, rank: int, dim: int) -> Planned:
    """A factor with rows (dim 0, of A) or columns (dim 1, of B) of zeros up to a rank."""
    shape = (rank, item.shape[1]) if dim == 0 else (item.shape[0], rank)
    room = [0, 0, 0, rank - item.shape[0]] if dim == 0 else [0, rank - item.shape[1]]
    return Planned.copy(Held(lambda: pad(read_tensor(item), room), item.dtype, shape))


def target_of(layer: str, frame: Frame) -> str:
    """What PEFT is to adapt for a layer: a tensor of `target_parameters`, or the layer's module."""
    tensor, _ = place_of(layer, frame.parameters)
    return tensor if tensor in frame.parameters else layer


class WrittenLayers:
    """PEFT's tensors of layers that come one after another, those of experts with their last.

    `ranks` has the rank of every target so far.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._experts: dict[str, dict[str, LoraFactors]] = {}
        self.ranks: dict[str, int] = {}

    def add(self, name: str, factors: LoraFactors) -> dict[str, Tensor]:
        """The tensors that this layer completes, by their keys in PEFT's files."""
        target = target_of(name, self._frame)
        count = self._frame.parameters.get(target, 1)
        if count == 1:
            self.ranks[target] = factors.rank
            return tensors_of(target, factors, self._frame)
        held = self._experts.setdefault(target, {})
        held[name] = factors
        if len(held) < count:
            return {}
        del self._experts[target]
        A, B, self.ranks[target] = packed([held[n] for n in expert_layers(target, count)])
        return tensors_of(target, LoraFactors(A, B), self._frame)


def weights_file(frame: Frame) -> str:
    """The name of the file with the factors."""
    return DIFFUSION if frame.form else WEIGHTS


def _keys(name: str, frame: Frame) -> tuple[str, str, str]:
    """What a file calls A, B and bias (kohya's: alpha) of a layer, or of a tensor of experts."""
    if frame.form:
        return keys_of(name, frame.form)
    if name in frame.parameters:
        name = wrapped_name(name, frame.parameters, "the merge")
    if name in frame.embeddings:
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B", ""
    stem = f"{PREFIX}{name}.lora_"
    return f"{stem}A.weight", f"{stem}B.weight", f"{stem}B.bias"


def whole_keys(
    layers: Collection[str], frame: Frame
) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """The keys of whole tensors in PEFT's files, and where each is found."""
    found = {PREFIX + name: (frame.modules, name) for name in frame.modules}
    for name in frame.copies:
        key = Key(name, copy=name.rpartition(".")[0] in layers)
        found[key.plain] = (frame.copies, name)
    return found


def tensors_of(name: str, factors: LoraFactors, frame: Frame) -> dict[str, Tensor]:
    """The tensors of a target by their keys in PEFT's files, the scaling in B."""
    key_A, key_B, key_bias = _keys(name, frame)
    alpha = factors.A.new_tensor(factors.rank)
    # As small types have it, which keep no large odd number.
    scaling = factors.scaling * (factors.rank / float(alpha) if frame.form == "kohya" else 1.0)
    A, B, window = factors.A, factors.B * scaling, frame.kernels.get(name, ())
    if window:
        A, B = A.reshape(len(A), -1, *window), B.reshape(*B.shape, *(1 for _ in window))
    found = {key_A: A, key_B: B}
    if frame.form == "kohya":
        found[key_bias] = alpha
    if frame.biases:
        bias = frame.biases.get(name)
        zero = factors.B.new_zeros(factors.shape[0])
        found[key_bias] = zero if bias is None else bias.to(zero)
    return found


def lora_settings(ranks: Mapping[str, int], frame: Frame) -> dict[str, Any]:
    """What PEFT's `LoraConfig` says of an adapter whose targets have these ranks, scaling 1."""
    expert = next((r for name, r in ranks.items() if _EXPERT.search(name)), None)
    common = expert or max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {_pattern(name, ranks): r for name, r in ranks.items() if r != common}
    tensors = sorted(ranks.keys() & frame.parameters.keys())
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "target_modules": frame.targets or sorted(ranks.keys() - frame.parameters.keys()),
        "target_parameters": (frame.target_parameters or tensors) if tensors else None,
        "fan_in_fan_out": frame.transposed,
        "lora_bias": bool(frame.biases),
        "modules_to_save": frame.modules_to_save,
        "task_type": frame.task_type,
        "base_model_name_or_path": frame.base_model,
        "revision": frame.revision,
        "inference_mode": True,
    }


def _pattern(name: str, layers: Iterable[str]) -> str:
    """A layer's name for PEFT's patterns, which match ends: bound where it ends another's.

    They are expressions, too: a name with signs of one is said as it stands.
    """
    ends = any(other.endswith(f".{name}") for other in layers)
    if ends:
        return f"^{re.escape(name)}"
    return name if re.fullmatch(r"[\w.-]+", name) else re.escape(name)


def write_heads(folder: Path, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Each task's modules as `heads/<task>.safetensors`."""
    for name, head in heads.items():
        (folder / HEADS).mkdir(exist_ok=True)
        with TensorWriter(folder / HEADS / f"{slug(name)}{HEAD}", head) as file:
            for key, tensor in head.items():
                file.add(key, tensor)

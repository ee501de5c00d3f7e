"""Many adapters in one basis per layer: what serving them together needs of memory and disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.adapters.align import align_adapters
from orthomerge.adapters.files import Adapter, common_base, read_adapter
from orthomerge.adapters.output import MergeOutput, distinct_names
from orthomerge.adapters.peft_config import config_text
from orthomerge.adapters.write import AdapterWriter, Frame, lora_settings, tensors_of, whole_keys
from orthomerge.errors import AdapterError, MergeError, unknown_name
from orthomerge.factors import LoraFactors
from orthomerge.io.files import atomic_path, copy_inside, slug
from orthomerge.io.names import CONFIG, SHARE, TASKS, WEIGHTS
from orthomerge.io.outputs import require_free
from orthomerge.io.tensors import TensorWriter, open_tensors, read_tensor
from orthomerge.merging import MergeConfig
from orthomerge.merging.parts.lowrank import Span, shared_rows, shared_subspaces, span_of
from orthomerge.records import about_adapter, about_base, seal, versions

SIDES = ("both", "right")
BASIS, COORDINATES = "basis.safetensors", "coordinates.safetensors"


@dataclass(frozen=True)
class SharedAdapters:
    """What `share_adapters` wrote: each task's error, in all and by layer, and what is kept.

    `errors[task][layer]` is `‖ΔW_t - B_t A‖_F / ‖ΔW_t‖_F`, `total[task]` the same over all layers.
    `before` and `after` are the numbers of values in the factors: of the adapters, and of the bases
    once with every task's coordinates.
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, Mapping[str, float]]
    total: Mapping[str, float]
    before: int
    after: int


class SharedLayer(NamedTuple):
    """One layer of all tasks: `ΔW_t ≈ left · coordinates_t · A`, orthonormal rows and columns.

    With one side, `left` is None and the coordinates are each task's whole B.
    """

    A: Float[Tensor, "rank d_in"]
    left: Float[Tensor, "d_out rank"] | None
    coordinates: list[Float[Tensor, "rows rank"]]
    errors: list[float]
    norms: list[float]

    def B(self, task: int) -> Float[Tensor, "d_out rank"]:
        """The task's B beside the shared A."""
        own = self.coordinates[task]
        return own if self.left is None else self.left @ own


def share_layer(factors: Sequence[LoraFactors], rank: int, side: str = SIDES[0]) -> SharedLayer:
    """The basis of rank `rank` in which the updates of one layer lose least, each of norm 1.

    It minimises `Σ_t ‖ΔW_t - U C_t V‖² / ‖ΔW_t‖²`: with `side="right"` (U the identity) by the
    leading eigenvectors of `Σ ΔW_tᵀΔW_t / ‖ΔW_t‖²`; with "both" by `shared_subspaces`. All of it in
    the updates' own span: O((d_in + d_out) R² + N R³), R the sum of their ranks.

    Source: Gabrielsson et al. 2025, Compress then Serve, arXiv 2407.00066 (joint compression with
    full coordinates).
    """
    present = [f for f in factors if f.rank] or list(factors[:1])
    span = span_of(present)
    small = iter(span.factors)
    cores = [next(small).delta() if f.rank else None for f in factors]
    some = next(core for core in cores if core is not None)
    cores = [some.new_zeros(some.shape) if core is None else core for core in cores]
    norms = [float(linalg.vector_norm(core)) for core in cores]
    eye = torch.eye(cores[0].shape[1]).to(cores[0])
    unit = [(core / (norm or 1.0), eye) for core, norm in zip(cores, norms, strict=True)]
    U: Tensor | None = None
    if side == "both":
        U, V = shared_subspaces(unit, rank)
    else:
        V = shared_rows(unit, rank)
    inner = [core @ V if U is None else U.T @ core @ V for core in cores]
    back = [(own if U is None else U @ own) @ V.T for own in inner]
    errors = [
        float(linalg.vector_norm(c - b)) / n if n else 0.0
        for c, b, n in zip(cores, back, norms, strict=True)
    ]
    return _lifted(span, U, V, inner, errors, norms)


def _lifted(
    span: Span,
    U: Tensor | None,
    V: Tensor,
    inner: Sequence[Tensor],
    errors: list[float],
    norms: list[float],
) -> SharedLayer:
    """The small solution in the layer's own spaces and dtype."""
    like = span.like.A
    A = span.right(V).T.to(like)
    if U is None:
        return SharedLayer(A, None, [span.left(own).to(like) for own in inner], errors, norms)
    left = span.left(U).to(like)
    return SharedLayer(A, left, [own.to(like) for own in inner], errors, norms)


def share_adapters(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    rank: int,
    *,
    side: str = SIDES[0],
    compact: bool = False,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SharedAdapters:
    """Use to serve many adapters of one base: one basis per layer, coordinates per task.

    Every task keeps an adapter of its own, an ordinary PEFT folder of rank at most `rank` under
    `tasks/`, whose A is the same in all of them. At `rank` of the sum of the adapters' ranks or
    more nothing is lost; `share.json` holds what each layer lost for each task.

    Args:
        adapters: PEFT folders, ids of the hub or adapters read before.
        output: the folder to write; it appears whole or not at all.
        rank: rows of the basis.
        side: "both": A and the columns of B are shared, and a task's own is `[rank, rank]`;
            "right": A alone is, and B is the task's own, which loses less.
        compact: write the basis once, and for each task its coordinates; `expand_shared` makes the
            PEFT folders of it.
        base: the base model, for DoRA and where adapters call it by several names.
        overwrite: replace an output folder that orthomerge wrote.
        progress: called with the number of layers done and their total.

    Raises:
        MergeError: a rank below 1.
        UnknownNameError: no such side.
        AdapterError: fewer than two adapters, or of different bases or shapes.
        OutputError: an output that is not free.
    """
    if side not in SIDES:
        raise unknown_name("side", side, SIDES, error=MergeError)
    if rank < 1:
        raise MergeError(f"the rank {rank} is none: give a whole number from 1 up.")
    if len(adapters) < 2:
        raise AdapterError("one adapter shares a basis with no other: name two or more.")
    require_free(output, inputs=adapters, base=base, overwrite=overwrite)
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    read = align_adapters(read, base=base)
    _require_plain(read)
    names = tuple(slug(name) for name in distinct_names(read))
    plan = MergeOutput(read, MergeConfig(weights=1.0, base=base), names)
    frames = [plan.task_frame(task) for task in range(len(read))]
    layers = list(dict.fromkeys(name for a in read for name in a.shapes))
    tally = _Tally(names)
    with atomic_path(output) as folder:
        write = _write_compact if compact else _write_folders
        with ExitStack() as stack:
            put = write(folder, names, layers, frames, stack)
            for done, (name, shared) in enumerate(_shared(read, layers, rank, side), start=1):
                put(name, shared)
                tally.add(name, shared, [a.layers[name] for a in read if name in a.shapes])
                if progress is not None:
                    progress(done, len(layers))
        found = tally.result()
        record = {
            "adapters": [about_adapter(n, a) for n, a in zip(names, read, strict=True)],
            **about_base(base, common_base(read)[0], None),
            "rank": rank, "side": side, "compact": compact, "errors": found.errors,
            "total": found.total, "before": found.before, "after": found.after,
            "versions": versions(),
        }  # fmt: skip
        seal(folder, SHARE, record)
    return found


def _require_plain(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if adapter.form is not None or adapter.parameters:
            kind = "of a diffusion model" if adapter.form else "of packed experts"
            raise AdapterError(
                f"'{adapter.called}' is an adapter {kind}, for which there is no server that "
                "shares a basis: merge it, or make it smaller with 'orthomerge resize'."
            )


def _shared(
    adapters: Sequence[Adapter], layers: Sequence[str], rank: int, side: str
) -> Iterator[tuple[str, SharedLayer]]:
    """Every layer in turn; a task without it has an update of rank 0."""
    for name in layers:
        held = [a.layers[name] if name in a.shapes else None for a in adapters]
        some = next(f for f in held if f is not None)
        dtype = reduce(torch.promote_types, (f.A.dtype for f in held if f is not None))
        none = LoraFactors(some.A[:0], some.B[:, :0])
        wide = torch.promote_types(dtype, torch.float32)
        shared = share_layer([(f or none).to(wide) for f in held], rank, side)
        left = None if shared.left is None else shared.left.to(dtype)
        own = [c.to(dtype) for c in shared.coordinates]
        yield name, shared._replace(A=shared.A.to(dtype), left=left, coordinates=own)


@dataclass
class _Tally:
    """Errors and sizes, added up layer by layer."""

    tasks: tuple[str, ...]
    errors: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    lost: dict[str, float] = field(default_factory=dict[str, float])
    all: dict[str, float] = field(default_factory=dict[str, float])
    before: int = 0
    after: int = 0

    def add(self, name: str, shared: SharedLayer, factors: Sequence[LoraFactors]) -> None:
        """Count one layer."""
        for task, error, norm in zip(self.tasks, shared.errors, shared.norms, strict=True):
            if norm:
                self.errors.setdefault(task, {})[name] = error
            self.lost[task] = self.lost.get(task, 0.0) + (error * norm) ** 2
            self.all[task] = self.all.get(task, 0.0) + norm**2
        self.before += sum(f.A.numel() + f.B.numel() for f in factors)
        basis = shared.A.numel() + (0 if shared.left is None else shared.left.numel())
        self.after += basis + sum(c.numel() for c in shared.coordinates)

    def result(self) -> SharedAdapters:
        """The whole."""
        total = {t: (self.lost[t] / n) ** 0.5 if n else 0.0 for t, n in self.all.items()}
        return SharedAdapters(self.tasks, self.errors, total, self.before, self.after)


_Put = Callable[[str, SharedLayer], None]


def _write_folders(
    folder: Path,
    tasks: Sequence[str],
    layers: Sequence[str],
    frames: Sequence[Frame],
    stack: ExitStack,
) -> _Put:
    """What writes a layer into every task's PEFT folder."""
    writers = [
        stack.enter_context(AdapterWriter(folder / TASKS / task, layers, frame))
        for task, frame in zip(tasks, frames, strict=True)
    ]

    def put(name: str, shared: SharedLayer) -> None:
        for task, writer in enumerate(writers):
            writer.add(name, LoraFactors(shared.A, shared.B(task)))

    return put


def _write_compact(
    folder: Path,
    tasks: Sequence[str],
    layers: Sequence[str],
    frames: Sequence[Frame],
    stack: ExitStack,
) -> _Put:
    """What writes a layer's basis once, and each task's coordinates under the key of its B."""
    keys = [[k for n in layers for k in _keys_of(n, frame)] for frame in frames]
    folder.mkdir(parents=True)
    basis = stack.enter_context(TensorWriter(folder / BASIS, keys[0]))
    files: list[TensorWriter] = []
    ranks: dict[str, int] = {}
    for task, frame, own in zip(tasks, frames, keys, strict=True):
        whole = whole_keys(set(layers), frame)
        (folder / TASKS / task).mkdir(parents=True)
        place = folder / TASKS / task / COORDINATES
        files.append(stack.enter_context(TensorWriter(place, [*own, *whole])))
        for key, (tensors, name) in whole.items():
            files[-1].add(key, tensors[name])

    def save_configs() -> None:
        for task, frame in zip(tasks, frames, strict=True) if ranks else ():
            text = config_text(lora_settings(ranks, frame))
            (folder / TASKS / task / CONFIG).write_text(text, encoding="utf-8")

    stack.callback(save_configs)

    def put(name: str, shared: SharedLayer) -> None:
        ranks[name] = len(shared.A)
        for task, (file, frame) in enumerate(zip(files, frames, strict=True)):
            B = shared.coordinates[task] if shared.left is None else shared.left
            (key_A, A), (key_B, right), *more = tensors_of(
                name, LoraFactors(shared.A, B), frame
            ).items()
            if task == 0:
                basis.add(key_A, A)
                if shared.left is not None:
                    basis.add(key_B, right)
            file.add(key_B, right if shared.left is None else shared.coordinates[task])
            for key, tensor in more:
                file.add(key, tensor)

    return put


def _keys_of(name: str, frame: Frame) -> list[str]:
    one = LoraFactors(torch.ones(1, 1), torch.ones(1, 1))
    plain = Frame(None, embeddings=frame.embeddings, biases=frame.biases)
    return list(tensors_of(name, one, plain))


def expand_shared(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Use to load what `share_adapters(..., compact=True)` wrote: a PEFT folder for each task.

    Raises:
        AdapterError: a folder without a basis, or coordinates that do not belong to it.
        OutputError: an output that is not free.
    """
    folder = Path(folder)
    require_free(output, inputs=[folder], overwrite=overwrite)
    if not (folder / BASIS).is_file():
        raise AdapterError(
            f"'{folder}' has no {BASIS}: name what 'orthomerge share --compact' wrote."
        )
    basis = open_tensors(folder / BASIS)
    tasks = sorted(path.name for path in (folder / TASKS).iterdir() if path.is_dir())
    with atomic_path(output) as place:
        for task in tasks:
            source, target = folder / TASKS / task, place / task
            own = open_tensors(source / COORDINATES)
            target.mkdir(parents=True)
            with TensorWriter(target / WEIGHTS, {**basis, **own}) as file:
                for key, stored in basis.items():
                    tensor = read_tensor(stored)
                    if key not in own:
                        file.add(key, tensor)
                        continue
                    C = read_tensor(own[key])
                    if C.ndim != 2 or C.shape[0] != tensor.shape[1]:
                        raise AdapterError(
                            f"'{source / COORDINATES}' holds '{key}' as {list(C.shape)}, which is "
                            f"of another basis than '{folder / BASIS}': copy the folder anew."
                        )
                    B = tensor.flatten(1) @ C
                    file.add(key, B.reshape(*B.shape, *tensor.shape[2:]))
                for key, stored in own.items():
                    if key not in basis:
                        file.add(key, read_tensor(stored))
            copy_inside(source / CONFIG, target / CONFIG, source)
    return [Path(output) / task for task in tasks]

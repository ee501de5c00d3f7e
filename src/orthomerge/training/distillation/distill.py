"""Distillation without labels: one adapter that gives each single adapter's own answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from orthomerge.adapters import Adapter, merge_adapters, read_adapter, save_distilled
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors, from_dense, truncate
from orthomerge.io.files import fingerprint
from orthomerge.io.outputs import require_apart, require_free
from orthomerge.merging import SUM, MergeConfig, MergedUpdate, Update, Weights
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.loading import load_tokenizer, preferred_device, tokenizer_hash
from orthomerge.statistics.distributed import process_rank
from orthomerge.training.distillation.batches import Place, Targets, plan_steps
from orthomerge.training.distillation.cache import keep, kept_file, read_kept, teach, teacher_key
from orthomerge.training.distillation.heads import Heads
from orthomerge.training.distillation.loop import train_student
from orthomerge.training.distillation.settings import DistillSettings
from orthomerge.training.distillation.student import Classroom, Student
from orthomerge.training.distillation.teachers import Teacher, Texts, read_teachers
from orthomerge.training.distillation.updates import Added, Adder, added

SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""What a merge may be scaled by where no weights are given: the nearest to the teachers wins."""
_PROBED = 16
"""Texts of each task that choose the scale."""


@dataclass(frozen=True)
class Measured:
    """How near the student was to the teachers after some steps, on texts held out.

    `distance` is the loss, the mean over tasks; `agreement` is by task, 1 for the same answers.
    """

    step: int
    distance: float
    agreement: dict[str, float]


@dataclass(frozen=True)
class Distilled:
    """What came out: the merged update, and how it came to be.

    `measured` begins with the start (step 0); `best` is the one whose factors were kept. `scale` is
    what the merge was multiplied by to begin with. `seconds` are by part of the work.
    """

    merged: MergedUpdate
    scale: float
    measured: list[Measured]
    best: Measured
    losses: list[tuple[int, float]]
    texts: dict[str, int]
    seconds: dict[str, float]
    cached: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def factors(self) -> dict[str, LoraFactors]:
        """The merged factors by layer."""
        return {n: f for n, f in self.merged.layers.items() if isinstance(f, LoraFactors)}


Progress = Callable[[str, int, int, float | None], None]
"""Told what is done, how much of it, of how much, and the mean agreement so far."""


def distill_adapters(
    adapters: Sequence[str | Path | Adapter],
    texts: Sequence[Texts],
    config: MergeConfig | None = None,
    *,
    start: str | Path | Adapter | None = None,
    method: str | None = None,
    weights: Weights | None = None,
    rank: int | str | None = None,
    samples: int = 100,
    settings: DistillSettings | None = None,
    problems: Sequence[str | None] | None = None,
    base: str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Distilled:
    """Merge adapters without loss: train the merged factors to give each adapter's own answers.

    Use it after training, where some unlabelled texts of every task are at hand. For the merged
    update ΔW and each task i with adapter ΔW_i, head f_i and texts x:

    `min_ΔW mean_i mean_x [ D(f_i(x; W + ΔW_i), f_i(x; W + ΔW)) + λ ‖h_i - h‖² / var(h_i) ]`

    D is KL(teacher ‖ student) for classes, the squared error relative to the variance of the
    teacher's values for a regression; h are the last hidden states of all tokens. The heads are
    held. Labels are not needed.

    Args:
        adapters: PEFT folders, ids of the hub or adapters read before.
        texts: each adapter's, in their order: a file or data set, or texts and pairs of texts.
        config: the merge to begin from; `method` (linear by default), `weights`, `base` and the
            method's options say the same in place of it, or change it. Without weights the merge
            is scaled as comes nearest to the teachers.
        start: a merged adapter to begin from instead.
        method: see `config`.
        weights: see `config`.
        rank: of the result; "auto" is the smallest whose start is about as near as the whole
            merge's. None keeps what the merge has, dense updates cut to the sum of the adapters'
            ranks.
        samples: texts of each task, drawn under the settings' seed.
        settings: of the training.
        problems: what each head's outputs are, where it is not one class of several, or a value for
            one output.
        base: the base model; by default the one the adapters name.
        text_column: the column of the texts in files.
        pair_column: the column of second texts.
        output: the folder to write, whole or not at all.
        overwrite: replace an output folder that orthomerge wrote.
        cache: a folder that keeps the teachers' outputs for further runs.
        progress: see `Progress`.
        options: of the merging method.

    Raises:
        AdapterError: adapters or heads that cannot be read or do not fit, biases that were trained,
            or an output that is not free (`OutputError`).
        MergeError: texts, weights, ranks or settings that do not fit.
        OrthomergeError: a loss that is not finite.
        StatisticsError, AssetError: texts or a base that cannot be read.

    Source: Hinton et al. 2015, arXiv 1503.02531, with adapters of the same base as teachers.
    """
    settings = settings or DistillSettings()
    config = MergeConfig.of(config, method=method, weights=weights, base=base, **options)
    if output is not None:
        require_free(
            output, inputs=[*adapters, start, *texts], base=config.base, overwrite=overwrite
        )
    teachers = read_teachers(
        adapters, texts, base=base, samples=samples, seed=settings.seed, problems=problems,
        text_column=text_column, pair_column=pair_column,
    )  # fmt: skip
    scaled = config.weights is None and start is None
    if scaled:
        config = replace(config, weights=1.0)
    begun = _begin(teachers, start, config)
    found = _base_of(teachers, config.base)
    if output is not None:
        require_apart(output, base=found.path_or_id)
    with ExitStack() as stack:
        folder = Path(cache) if cache else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = _Work(teachers, found, settings, begun, folder, scratch, progress)
        stack.callback(work.close)
        distilled = work.run(rank or config.rank, scaled=scaled)
    if output is not None and process_rank()[0] == 0:
        _save(Path(output), distilled, teachers, begun, settings, overwrite=overwrite)
    return distilled


@dataclass(frozen=True)
class _Begun:
    """The merge to begin from, and what the record says of it."""

    layers: Mapping[str, Update]
    config: MergeConfig
    record: dict[str, Any]


def _begin(
    teachers: Sequence[Teacher], start: str | Path | Adapter | None, config: MergeConfig
) -> _Begun:
    """The merge that was asked for, or that is there already."""
    if start is None:
        merged = merge_adapters([t.adapter for t in teachers], replace(config, rank=SUM))
        return _Begun(merged.layers, config, {"merge": config.to_dict()})
    if config != MergeConfig(rank=config.rank, base=config.base):
        raise MergeError(
            "a start is a merge already: leave out method, weights and options, or the start."
        )
    read = start if isinstance(start, Adapter) else read_adapter(start, base=config.base)
    if read.biases:
        raise AdapterError(f"'{read.called}' has biases (lora_bias): begin from one without.")
    return _Begun(read.layers, config, {"path": read.called, "sha256": read.sha256})


def _base_of(teachers: Sequence[Teacher], base: str | None) -> ResolvedModel:
    named = base or next((t.adapter.base_model for t in teachers if t.adapter.base_model), None)
    if not named:
        raise AdapterError("the adapters do not name their base model: name it with base (--base).")
    return resolve_model(named)


class _Work:
    """One distillation, step by step."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        base: ResolvedModel,
        settings: DistillSettings,
        begun: _Begun,
        cache: Path | None,
        scratch: Path,
        progress: Progress | None,
    ) -> None:
        self._teachers, self._base, self._settings = teachers, base, settings
        self._begun, self._cache, self._scratch = begun, cache, scratch
        self._progress = progress
        self._device = preferred_device()
        self._seconds: dict[str, float] = {}
        self._began = monotonic()
        tokenizer = load_tokenizer(base.path_or_id)
        self._form = Heads(base, tokenizer, teachers, settings.max_length).to(self._device)
        shapes = {n: s for t in teachers for n, s in t.adapter.shapes.items()}
        shapes |= {n: _shape(u) for n, u in begun.layers.items()}
        self._adder = Adder(self._form.model, shapes)
        self._tokens = tokenizer_hash(tokenizer)
        self._lap("load")

    def close(self) -> None:
        """Leave the model as it was."""
        self._adder.close()

    def run(self, rank: int | str | None, *, scaled: bool) -> Distilled:
        """Ask the teachers, begin, train, and keep the best factors."""
        examples = [self._form.encode(i, t.texts) for i, t in enumerate(self._teachers)]
        targets, cached = self._taught(examples)
        room = Classroom(self._form, self._adder, examples, targets, self._device)
        train, held = self._split()
        self._lap("teachers")
        layers, scale = self._start(room, train, rank, scaled=scaled)
        student = Student(room, layers, self._settings.hidden)
        self._lap("start")
        measured: list[Measured] = []
        best: list[dict[str, LoraFactors]] = []

        def measure(step: int) -> bool:
            now = self._measure(room, student.update, held, step)
            if not measured or now.distance < min(m.distance for m in measured):
                best[:] = [student.layers()]
            measured.append(now)
            return self._finished(measured)

        measure(0)
        losses = train_student(
            student, self._passes(room, train), self._settings, self._scratch,
            measure=measure, progress=self._told("distilling", measured),
        )  # fmt: skip
        self._lap("training")
        merged = MergedUpdate(best[0], "distill")
        found = min(measured, key=lambda m: m.distance)
        counts = {t.name: len(t.texts) for t in self._teachers}
        return Distilled(
            merged, scale, measured, found, losses, counts, dict(self._seconds), cached
        )

    # Parts ----------------------------------------------------------------------------------

    def _taught(self, examples: Sequence[Any]) -> tuple[list[Targets], dict[str, Any]]:
        how = {
            "tokenizer": self._tokens,
            "max_length": self._settings.max_length,
            "type": str(self._form.model.dtype),
        }
        total, done = sum(len(t.texts) for t in self._teachers), 0
        found: list[Targets] = []
        for i, teacher in enumerate(self._teachers):
            key = teacher_key(teacher, self._base, how)
            file = kept_file(self._cache, teacher, key) if self._cache else None
            targets = read_kept(file, key) if file else None
            if targets is None:
                targets = teach(
                    self._form, self._adder, i, teacher, examples[i], self._device,
                    self._adding("asking the teachers", done, total),
                )  # fmt: skip
                if file and process_rank()[0] == 0:
                    keep(file, key, targets)
            found.append(targets)
            done += len(teacher.texts)
        size = sum(t.hidden.nbytes + t.answers.nbytes for t in found)
        return found, {"bytes": size, "type": str(found[0].hidden.dtype).removeprefix("torch.")}

    def _split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Texts to train on and texts held out, by task; few texts are trained on and measured."""
        train: list[list[int]] = []
        held: list[list[int]] = []
        for teacher in self._teachers:
            count = len(teacher.texts)
            kept = int(count * self._settings.held_out)
            train.append(list(range(count - kept)))
            held.append(list(range(count - kept, count)) or list(range(count)))
        return train, held

    def _start(
        self, room: Classroom, train: Sequence[Sequence[int]], rank: int | str | None, *,
        scaled: bool,
    ) -> tuple[dict[str, LoraFactors], float]:  # fmt: skip
        most = _sum_of_ranks(self._teachers)
        whole = {
            name: update if isinstance(update, LoraFactors) else from_dense(update, most)
            for name, update in self._begun.layers.items()
        }
        places = [Place(t, r) for t, rows in enumerate(train) for r in rows[:_PROBED]]
        scale = 1.0
        if scaled:
            near = {
                s: self._distance(room, _scaled(whole, s, self._device), places) for s in SCALES
            }
            scale = min(near, key=near.__getitem__)
        whole = {n: LoraFactors(f.A, f.B, f.scaling * scale) for n, f in whole.items()}
        if rank in (None, SUM):
            return whole, scale
        if isinstance(rank, int):
            return {n: truncate(f, rank) for n, f in whole.items()}, scale
        if rank != "auto":
            raise MergeError(f"rank '{rank}': it is a number, or 'auto'.")
        return self._smallest(room, whole, places), scale

    def _smallest(
        self, room: Classroom, whole: Mapping[str, LoraFactors], places: Sequence[Place]
    ) -> dict[str, LoraFactors]:
        """The whole start cut to the smallest rank that is about as near to the teachers."""
        most = max(f.rank for f in whole.values())
        tried = max((f.rank for t in self._teachers for f in t.adapter.layers.values()), default=1)
        bound = 1.05 * self._distance(room, _scaled(whole, 1.0, self._device), places)
        while tried < most:
            cut = {n: truncate(f, tried) for n, f in whole.items()}
            if self._distance(room, _scaled(cut, 1.0, self._device), places) <= bound:
                return cut
            tried *= 2
        return dict(whole)

    def _distance(
        self, room: Classroom, update: Mapping[str, Added], places: Sequence[Place]
    ) -> float:
        """The mean loss over texts, each with the same weight."""
        total = 0.0
        for piece in self._pieces(room, places):
            with torch.no_grad():
                found = room.distances(piece, update)
            total += float((found.answers + self._settings.hidden * found.hidden).sum())
        return total / len(places)

    def _pieces(self, room: Classroom, places: Sequence[Place]) -> list[list[Place]]:
        order = sorted(places, key=lambda p: room.lengths[p.task][p.row])
        size = 2 * self._settings.rows_a_pass
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _measure(
        self, room: Classroom, update: Mapping[str, Added], held: Sequence[Sequence[int]], step: int
    ) -> Measured:
        places = [Place(t, r) for t, rows in enumerate(held) for r in rows]
        sums = [0.0] * len(held)
        said: list[list[Any]] = [[] for _ in held]
        rows: list[list[int]] = [[] for _ in held]
        for piece in self._pieces(room, places):
            with torch.no_grad():
                found = room.distances(piece, update)
            loss = found.answers + self._settings.hidden * found.hidden
            for place, value in zip(piece, loss, strict=True):
                sums[place.task] += float(value)
                rows[place.task].append(place.row)
            for task, outputs in found.said.items():
                said[task].append(outputs.cpu())
        agreement = {
            teacher.name: self._form.agreement(
                t, torch.cat(said[t]), room.targets[t].answers[rows[t]].float()
            )
            for t, teacher in enumerate(self._teachers)
        }
        distance = sum(s / len(h) for s, h in zip(sums, held, strict=True)) / len(held)
        return Measured(step, distance, agreement)

    def _finished(self, measured: Sequence[Measured]) -> bool:
        patience = self._settings.patience
        if patience is None:
            return False
        best = min(range(len(measured)), key=lambda i: measured[i].distance)
        return len(measured) - 1 - best >= patience

    def _passes(self, room: Classroom, train: Sequence[Sequence[int]]) -> list[Any]:
        rank, world = process_rank()
        rows = sum(min(self._settings.batch_size, len(t)) for t in train)
        parts = max(1, round(rows / (world * self._settings.rows_a_pass)))
        if rows < parts * world:
            raise MergeError(
                f"a step of {rows} texts cannot be shared by {world} processes: start fewer, or "
                "choose a larger batch size."
            )
        return list(
            plan_steps(
                train, room.lengths, steps=self._settings.steps,
                batch_size=self._settings.batch_size, passes=parts, world=world, rank=rank,
                seed=self._settings.seed,
            )
        )  # fmt: skip

    def _lap(self, part: str) -> None:
        now = monotonic()
        self._seconds[part] = round(now - self._began, 2)
        self._began = now

    def _adding(self, what: str, done: int, total: int) -> Callable[[int], None]:
        so_far = done

        def add(more: int) -> None:
            nonlocal so_far
            so_far += more
            if self._progress is not None:
                self._progress(what, so_far, total, None)

        return add

    def _told(self, what: str, measured: Sequence[Measured]) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if self._progress is not None:
                last = measured[-1].agreement.values()
                self._progress(what, done, total, sum(last) / len(last))

        return tell


def _scaled(
    layers: Mapping[str, LoraFactors], scale: float, device: torch.device
) -> dict[str, Added]:
    return {n: Added(u.A, u.B * scale) for n, u in added(layers, device).items()}


def _shape(update: Update) -> tuple[int, int]:
    if isinstance(update, LoraFactors):
        return update.shape
    return int(update.shape[0]), int(update.shape[1])


def _sum_of_ranks(teachers: Sequence[Teacher]) -> int:
    """The rank that the plain sum of the adapters has."""
    return sum(max((f.rank for f in t.adapter.layers.values()), default=0) for t in teachers)


def _save(
    output: Path,
    distilled: Distilled,
    teachers: Sequence[Teacher],
    begun: _Begun,
    settings: DistillSettings,
    *,
    overwrite: bool,
) -> None:
    count = len(teachers)
    scaled = [w * distilled.scale for w in begun.config.spread(count)]
    save_distilled(
        output,
        distilled.merged,
        [t.adapter for t in teachers],
        replace(begun.config, weights=scaled, rank=None),
        {
            "from": {**begun.record, "scale": distilled.scale},
            "settings": asdict(settings),
            "texts": [
                {"count": len(t.texts), "sha256": fingerprint([list(x) for x in t.texts])}
                for t in teachers
            ],
            "measured": [asdict(m) for m in distilled.measured],
            "best": distilled.best.step,
            "losses": distilled.losses,
            "seconds": distilled.seconds,
            "teachers": distilled.cached,
        },
        names=[t.name for t in teachers],
        overwrite=overwrite,
    )

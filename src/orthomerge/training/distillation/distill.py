"""Distillation without labels: one adapter that gives each single adapter's own answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch
from torch import Tensor

from orthomerge.adapters import Adapter, merge_adapters, read_adapter, save_distilled
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors
from orthomerge.io.files import fingerprint, write_json
from orthomerge.io.outputs import require_apart, require_free, require_resumable
from orthomerge.io.sealed import digest
from orthomerge.merging import SUM, MergeConfig, MergedUpdate, Update, Weights
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.loading import load_tokenizer, preferred_device, tokenizer_hash
from orthomerge.statistics import Statistics
from orthomerge.statistics.distributed import process_rank
from orthomerge.tasks import Prompt
from orthomerge.training.distillation.batches import Pass, Place, plan_steps
from orthomerge.training.distillation.cache import keep, kept_file, read_kept, teach, teacher_key
from orthomerge.training.distillation.forms import Form, Installed, Taught
from orthomerge.training.distillation.heads import Heads
from orthomerge.training.distillation.layerwise import merge_on_texts
from orthomerge.training.distillation.loop import checkpoint_of, step_of, train_student
from orthomerge.training.distillation.measure import Measured, Referee
from orthomerge.training.distillation.settings import DistillSettings
from orthomerge.training.distillation.start import Start, begin, check_start_rank, sum_of_ranks
from orthomerge.training.distillation.student import Classroom, Student
from orthomerge.training.distillation.teachers import (
    Teacher,
    Texts,
    TextSource,
    form_of,
    parts_of,
    read_teachers,
)
from orthomerge.training.distillation.updates import Adder, layers_of
from orthomerge.training.distillation.vectors import Vectors
from orthomerge.training.distillation.words import Words

WORK = ".distill"
"""What is added to an output's name for the folder that a distillation goes on from."""

MARK, TEACHERS, TRAINING = "distillation.json", "teachers", "training"
"""What is in it."""


@dataclass(frozen=True)
class Distilled:
    """What came out: the merged update, and how it came to be.

    `measured` begins with the start (step 0); `best` is the one whose factors were kept. `scale` is
    what the merge was multiplied by to begin with. `texts` counts each task's texts, `seconds` are
    by part of the work, `kept` says the size and type of the teachers' answers.
    """

    merged: MergedUpdate
    scale: float
    measured: list[Measured]
    best: Measured
    losses: list[tuple[int, float]]
    texts: dict[str, int]
    seconds: dict[str, float]
    kept: dict[str, Any]

    @property
    def factors(self) -> dict[str, LoraFactors]:
        """The merged factors by layer."""
        return cast(dict[str, LoraFactors], dict(self.merged.layers))


Progress = Callable[[str, int, int, Measured | None], None]
"""Called with what is done, how much of it, of how much, and the last measurement."""


def distill_adapters(
    adapters: Sequence[str | Path | Adapter],
    texts: Sequence[Texts],
    config: MergeConfig | None = None,
    *,
    start: str | Path | Adapter | None = None,
    layer_wise: bool = False,
    method: str | None = None,
    weights: Weights | None = None,
    rank: int | str | None = None,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    base: str | None = None,
    form: str | None = None,
    samples: int = 100,
    settings: DistillSettings | None = None,
    problems: Sequence[str | None] | None = None,
    prompts: Sequence[Prompt | None] | None = None,
    answer_tokens: int | None = None,
    pooling: str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Distilled:
    """Merge adapters without loss: train the merged factors to give each adapter's own answers.

    Use it after training, where some unlabelled texts of every task are at hand. For the merged
    update ΔW and each task i with adapter ΔW_i, head f_i and texts x:

    `min_ΔW mean_i mean_x [ D(f_i(x; W + ΔW_i), f_i(x; W + ΔW)) + λ ‖h_i - h‖² / var(h_i) ]`

    D is KL(teacher ‖ student) in nats: of classes, or of the next token at the tokens of an answer
    (or all of a text). For a regression or a text's vector it is the squared error relative to the
    variance of the teacher's. h are the last hidden states of all tokens. The heads are held.
    Labels are not needed.

    Args:
        adapters: PEFT folders, ids of the hub or adapters read before. A merge's folder with heads
            beside it teaches a task for each; one head's file in it teaches that task.
        texts: each adapter's, in their order: a file or data set, or texts and pairs of texts.
        config: the merge to begin from; `method` (linear by default), `weights`, `base` and the
            method's options say the same in place of it, or change it. Without weights the merge
            is scaled as comes nearest to the teachers. Adapters that several tasks share count
            once.
        start: a merged adapter to begin from instead.
        layer_wise: merge layer after layer, each on the inputs that the layers merged so far give;
            for methods that read moments. With `regmean`, and no steps after it, it is RegMean++.
        method: see `config`.
        weights: see `config`.
        rank: of the result; "auto" is the smallest whose start is about as near as the whole
            merge's. None keeps what the merge has, dense updates cut to the sum of the adapters'
            ranks.
        statistics: each adapter's, where the method to begin from reads moments; without, they are
            of the base on the texts.
        fisher: each adapter's Fisher information, where that method needs it.
        base: see `config`; by default the one the adapters name.
        form: "classifier", "text" or "embedding"; by default what the adapters say.
        samples: texts of each task, drawn under the settings' seed.
        settings: of the training.
        problems: what each head's outputs are, where it is not one class of several, or a value for
            one output.
        prompts: how a language model is asked each task, in a list None for texts as they stand;
            default as each adapter's record says that it was trained.
        answer_tokens: tokens that a language model's teacher writes after a text without a prompt;
            None compares the text's own (32 for an encoder-decoder, which has none).
        pooling: how an embedding model pools; by default what its folder says, else the mean.
        text_column: the column of the texts in files.
        pair_column: the column of second texts; by default "pair" where there is one.
        output: the folder to write, whole or not at all.
        overwrite: replace an output folder that orthomerge wrote.
        work: a folder that keeps what a stopped call had done until it is called again; by default
            `OUTPUT.distill`, and none without an output.
        cache: a folder that keeps the teachers' answers for further runs.
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
    if config.energy is not None:
        raise MergeError(
            "a distilled merge has no rank by energy: give the rank itself, where 'auto' is the "
            "smallest that begins about as near to the teachers as the whole merge."
        )
    rank = rank or config.rank
    check_start_rank(rank)
    if output is not None:
        require_free(
            output, inputs=[*adapters, start, *texts], base=config.base, overwrite=overwrite
        )
    source = TextSource(samples, settings.seed, text_column, pair_column)
    teachers = read_teachers(
        adapters, texts, source, base=config.base, problems=problems, prompts=prompts
    )
    kind = form_of(teachers, form)
    begun = _begin(
        teachers, start, config, layer_wise=layer_wise, statistics=statistics, fisher=fisher
    )
    found = _base_of(teachers, config.base)
    if output is not None:
        require_apart(output, base=found.path_or_id)
        work = work or Path(output).with_name(Path(output).name + WORK)
    kept = None if work is None else Path(work)
    if kept is not None:
        require_resumable(kept, [MARK], "distillation", base=found.path_or_id)
    with ExitStack() as stack:
        scratch = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tokenizer = load_tokenizer(found.path_or_id)
        asked = _form(kind, found, tokenizer, teachers, settings, answer_tokens, pooling)
        run = _Run(teachers, found, settings, begun, asked, progress)
        stack.callback(run.close)
        run.identity = {"tokenizer": tokenizer_hash(tokenizer)}
        folder = Path(cache) if cache else None
        distilled = run.run(rank, scratch, folder, keeps=kept is not None)
    if process_rank()[0] == 0:
        if output is not None:
            _save(Path(output), distilled, teachers, begun, settings, kind, overwrite=overwrite)
        if kept is not None:
            _clear(kept)
    return distilled


def _clear(work: Path) -> None:
    """Remove what a distillation left to go on from, and nothing else."""
    for folder in (TEACHERS, TRAINING):
        shutil.rmtree(work / folder, ignore_errors=True)
    (work / MARK).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def _form(
    kind: str,
    base: ResolvedModel,
    tokenizer: Any,
    teachers: Sequence[Teacher],
    settings: DistillSettings,
    answer_tokens: int | None,
    pooling: str | None,
) -> Form:
    """The base as the tasks ask for it."""
    length = settings.max_length
    if kind == "text":
        return Words(base, tokenizer, teachers, length, answer_tokens)
    if kind == "embedding":
        return Vectors(base, tokenizer, teachers, length, pooling)
    return Heads(base, tokenizer, teachers, length)


@dataclass(frozen=True)
class _Begun:
    """The merge to begin from, and what the record says of it.

    `layers` are None where it takes the running model to find them.
    """

    layers: Mapping[str, Update] | None
    config: MergeConfig
    record: dict[str, Any]
    scaled: bool
    layer_wise: bool = False


def _begin(
    teachers: Sequence[Teacher],
    start: str | Path | Adapter | None,
    config: MergeConfig,
    *,
    layer_wise: bool,
    statistics: Any,
    fisher: Any,
) -> _Begun:
    """The merge that was asked for, or that is there already."""
    if start is None:
        scaled = config.weights is None
        if scaled:
            config = replace(config, weights=1.0)
        record = {"merge": config.to_dict(), "layer_wise": layer_wise}
        reads = "moments" in config.needs
        if layer_wise and (statistics is not None or not reads):
            raise MergeError(
                f"'{config.method}' is not merged layer by layer: name a method that reads moments "
                "(regmean, osrm_aware), and give it no statistics."
            )
        if reads and statistics is None:
            return _Begun(None, config, record, scaled, layer_wise)
        merged = merge_adapters(
            parts_of(teachers), replace(config, rank=SUM), statistics=statistics, fisher=fisher
        )
        return _Begun(merged.layers, config, record, scaled)
    if layer_wise or config != MergeConfig(rank=config.rank, base=config.base):
        raise MergeError(
            "a start is a merge already: leave out method, weights and options, or the start."
        )
    read = start if isinstance(start, Adapter) else read_adapter(start, base=config.base)
    if read.biases:
        raise AdapterError(f"'{read.called}' has biases (lora_bias): begin from one without.")
    layers = {name for t in teachers for name in t.adapter.layers}
    if set(read.layers) != layers:
        odd = sorted(set(read.layers) ^ layers)[0]
        raise AdapterError(
            f"'{read.called}' and the adapters differ in layer '{odd}': begin from a merge of "
            "these adapters."
        )
    return _Begun(read.layers, config, {"path": read.called, "sha256": read.sha256}, False)


def _base_of(teachers: Sequence[Teacher], base: str | None) -> ResolvedModel:
    named = base or next((t.adapter.base_model for t in teachers if t.adapter.base_model), None)
    if not named:
        raise AdapterError("the adapters do not name their base model: name it with base (--base).")
    return resolve_model(named)


class _Run:
    """One distillation, part by part."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        base: ResolvedModel,
        settings: DistillSettings,
        begun: _Begun,
        form: Form,
        progress: Progress | None,
    ) -> None:
        self._teachers, self._base, self._settings = teachers, base, settings
        self._begun, self._progress = begun, progress
        self._seconds: dict[str, float] = {}
        self._clock = monotonic()
        self.identity: dict[str, Any] = {}
        shapes = {n: s for t in teachers for n, s in t.adapter.shapes.items()}
        self._modules = layers_of(form.model, shapes)
        form.backbone.require_inside(self._modules)
        device = _device()
        form.to(device)
        self._where = Installed(form, Adder(self._modules), device)

    def close(self) -> None:
        """Leave the model as it was."""
        self._where.adder.close()

    def run(
        self, rank: int | str | None, work: Path, cache: Path | None, *, keeps: bool
    ) -> Distilled:
        """Ask the teachers, begin, train, and keep the best factors."""
        settings = self._settings
        if keeps and process_rank()[0] == 0:
            write_json(work / MARK, {"adapters": [t.name for t in self._teachers]})
        folder = cache or (work / TEACHERS if keeps else None)
        taught, keys, kept = self._taught(folder)
        room = Classroom(self._where, taught, settings.hidden, 2 * settings.rows_a_pass)
        train, held = self._split()
        self._lap("teachers")
        merge = self._begun.layers
        begun = begin(
            room, self._merged(room, train) if merge is None else merge, train, rank,
            dense_rank=sum_of_ranks([p.layers for p in parts_of(self._teachers)]),
            scaled=self._begun.scaled,
        )  # fmt: skip
        student = Student(room, begun.layers)
        self._lap("start")
        place = work / TRAINING
        question = self._question(keys, begun)
        resumed = checkpoint_of(place, question) if keeps else None
        referee = Referee(
            room, student, held, [t.name for t in self._teachers], patience=settings.patience,
            folder=place if keeps else None, report=self._report,
        )  # fmt: skip
        if resumed is None or not referee.go_on_from(step_of(resumed)):
            resumed = None
            referee.measure(0)
        losses: list[tuple[int, float]] = []
        if settings.steps:
            losses = train_student(
                student, self._passes(room, train), settings, place, referee,
                resumed=resumed, keeps=keeps, progress=self._steps(referee),
            )  # fmt: skip
        self._lap("training")
        texts = {t.name: len(t.texts) for t in self._teachers}
        merged = MergedUpdate(referee.factors(), "distill")
        return Distilled(
            merged, begun.scale, referee.measured, referee.best, losses, texts, self._seconds, kept
        )

    def _merged(self, room: Classroom, train: Sequence[Sequence[int]]) -> dict[str, Update]:
        """The merge of the adapters' layers by moments that are read off the running model."""
        numbers = sorted({t.part for t in self._teachers})
        texts = [
            [Place(t, r) for t, who in enumerate(self._teachers) if who.part == n for r in train[t]]
            for n in numbers
        ]
        parts = [part.layers for part in parts_of(self._teachers)]
        return merge_on_texts(
            room, self._modules, parts, texts, self._begun.config,
            layer_wise=self._begun.layer_wise,
        )  # fmt: skip

    def _taught(self, folder: Path | None) -> tuple[list[Taught], list[str], dict[str, Any]]:
        """What the teachers said, each one's key, and how large all of it is."""
        form = self._where.form
        total, done = sum(len(t.texts) for t in self._teachers), 0
        found: list[Taught] = []
        keys: list[str] = []
        for task, teacher in enumerate(self._teachers):
            about = {**self.identity, **form.identity(task), "type": str(form.model.dtype)}
            key = teacher_key(teacher, self._base, about)
            file = kept_file(folder, teacher, key) if folder else None
            taught = read_kept(file, key) if file else None
            if taught is None:
                taught = teach(self._where, task, teacher, self._adding(done, total))
                if file and process_rank()[0] == 0:
                    keep(file, key, taught)
            found.append(taught)
            keys.append(key)
            done += len(teacher.texts)
        size = sum(t.hidden.nbytes + t.answers.nbytes for t in found)
        kind = str(found[0].hidden.dtype).removeprefix("torch.")
        return found, keys, {"bytes": size, "type": kind}

    def _split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Texts to train on and texts held out, by task; too few are trained on and measured."""
        train: list[list[int]] = []
        held: list[list[int]] = []
        for teacher in self._teachers:
            count = len(teacher.texts)
            kept = int(count * self._settings.held_out)
            train.append(list(range(count - kept)))
            held.append(list(range(count - kept, count)) or list(range(count)))
        return train, held

    def _question(self, keys: Sequence[str], begun: Start) -> str:
        """All that a training depends on, as a hash."""
        tensors = {f"{n}.A": f.A for n, f in begun.layers.items()}
        tensors |= {f"{n}.B": f.B * f.scaling for n, f in begun.layers.items()}
        asked = [list(keys), digest(tensors), asdict(self._settings), process_rank()[1]]
        return fingerprint(asked)

    def _passes(self, room: Classroom, train: Sequence[Sequence[int]]) -> list[list[Pass]]:
        settings, (rank, world) = self._settings, process_rank()
        rows = sum(min(settings.batch_size, len(t)) for t in train)
        parts = max(1, round(rows / (world * settings.rows_a_pass)))
        if rows < parts * world:
            raise MergeError(
                f"a step of {rows} texts cannot be shared by {world} processes: start fewer, or "
                "choose a larger batch size."
            )
        return list(
            plan_steps(
                train, room.lengths, steps=settings.steps, batch_size=settings.batch_size,
                passes=parts, world=world, rank=rank, seed=settings.seed,
            )
        )  # fmt: skip

    # Progress and log -----------------------------------------------------------------

    def _lap(self, part: str) -> None:
        now = monotonic()
        self._seconds[part] = round(now - self._clock, 2)
        self._clock = now

    def _adding(self, done: int, total: int) -> Callable[[int], None]:
        so_far = done

        def add(more: int) -> None:
            nonlocal so_far
            so_far += more
            if self._progress is not None:
                self._progress("teachers", so_far, total, None)

        return add

    def _steps(self, referee: Referee) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress("training", done, total, referee.measured[-1])

        return tell

    def _report(self, measured: Measured) -> None:
        if self._progress is not None:
            self._progress("measured", measured.step, self._settings.steps, measured)


def _device() -> torch.device:
    """Where this process computes: its own accelerator in a job of several."""
    if process_rank()[1] == 1:
        return preferred_device()
    from accelerate import PartialState

    return cast(torch.device, PartialState().device)


def _save(
    output: Path,
    distilled: Distilled,
    teachers: Sequence[Teacher],
    begun: _Begun,
    settings: DistillSettings,
    form: str,
    *,
    overwrite: bool,
) -> None:
    """Write the adapter, the heads, the record and the card."""
    weights = begun.config.spread(len(parts_of(teachers)))
    numbers = sorted({t.part for t in teachers})
    own = [weights[numbers.index(t.part)] * distilled.scale for t in teachers]
    save_distilled(
        output,
        distilled.merged,
        [t.adapter for t in teachers],
        replace(begun.config, weights=own, rank=None),
        {
            "from": {**begun.record, "scale": distilled.scale},
            "form": form,
            "settings": asdict(settings),
            "texts": [
                {"count": len(t.texts), "sha256": fingerprint([list(x) for x in t.texts])}
                for t in teachers
            ],
            "measured": [asdict(m) for m in distilled.measured],
            "best": distilled.best.step,
            "losses": distilled.losses,
            "seconds": distilled.seconds,
            "teachers": distilled.kept,
        },
        names=[t.name for t in teachers],
        overwrite=overwrite,
    )

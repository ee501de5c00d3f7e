"""Merge weights searched on validation rows by Optuna; a study on disk that can be gone on with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from orthomerge.errors import MergeError, OrthomergeError
from orthomerge.evaluation import Evaluator, score
from orthomerge.files import derive_seed
from orthomerge.merging import MergedUpdate, get_method, merge_layers, plan_merge
from orthomerge.tuning.groups import depth_groups
from orthomerge.tuning.inputs import Inputs, tokenizer_of
from orthomerge.tuning.result import Method, Trial, Tuned

if TYPE_CHECKING:
    import optuna

STUDY = "study.sqlite3"
LOCK = f".{STUDY}.lock"
"""Held while a study is made; another run may see it before there is one."""
_UNIFORM = (0.2, 0.4, 0.6, 0.8)
_MADE_FOR = "made for"
_TASKS = "tasks"


@dataclass(frozen=True)
class SearchSettings:
    """How weights are searched.

    `trials` in all, those of an earlier run included; `groups` of layers in depth, each with
    weights of its own; weights lie in [`low`, `high`].
    """

    trials: int = 50
    groups: int = 1
    low: float = 0.0
    high: float = 1.5
    seed: int = 0
    max_length: int = 48

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise MergeError(
                f"weights from {self.low:g} to {self.high:g}: give finite ends, the lowest first."
            )
        if self.trials < 1:
            raise MergeError(f"{self.trials} trials: ask for at least one.")


def search_weights(
    inputs: Inputs,
    output: str | Path,
    *,
    method: Method | None = None,
    settings: SearchSettings | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Tuned:
    """The merge weights of the best mean score on the tasks' selection rows.

    `argmax_w (1/T) Σ_t m_t(merge(ΔW_1..N; w))` with m_t the task's own metric, under the head of
    its own adapter; one weight an adapter, or one an adapter and group of layers. Tried first: 1
    for all, 1/N for all, and .2, .4, .6, .8 for all; then what Optuna's TPE proposes (Bergstra et
    al. 2011), each proposal under a seed of its own, so that a search that was stopped goes on as
    it would have. Cost: a merge and T predictions over the rows a trial.

    The study is an SQLite file in `output`: a run that was killed at any moment, or two that run
    at once, leave it whole; a rerun goes on to the number of trials asked for, two runs share them.

    Args:
        inputs: adapters, tasks and rows, from `read_inputs`.
        output: the folder of the study; made when everything else was found to be right.
        method: how the adapters are merged; linear by default.
        settings: of the search.
        progress: called with the trials done, their total and the best score so far.

    Raises:
        MergeError: the method's options, the groups or the range of weights do not fit, or the
            study in `output` was made for something else.
        OrthomergeError: Optuna is not installed, or the folder cannot be written.
        AdapterError: an adapter or a head that does not fit the base.
    """
    method, settings = method or Method(), settings or SearchSettings()
    require_optuna()
    problem = _Problem(inputs, method, settings)
    problem.check()
    study = _open(Path(output), _made_for(inputs, method, settings))
    with _quiet_optuna():
        _enqueue(study, problem.starts(), Path(output))
        done = _complete(study)
        while len(done) < settings.trials:
            _one_trial(study, problem, settings)
            done = _complete(study)
            if progress is not None:
                progress(len(done), settings.trials, max(t.value for t in done))
    return problem.tuned(done)


def require_optuna() -> None:
    """Refuse to search without Optuna.

    Raises:
        OrthomergeError: it is not installed.
    """
    try:
        import optuna  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as problem:
        raise OrthomergeError(
            "searching for weights needs Optuna, which is not installed: "
            "pip install 'orthomerge[tune]'."
        ) from problem


class _Problem:
    """The function that is maximised: weights in, the score of every task out."""

    def __init__(self, inputs: Inputs, method: Method, settings: SearchSettings) -> None:
        self._inputs, self._method, self._settings = inputs, method, settings
        self._layers = [adapter.layers for adapter in inputs.adapters]
        self._groups = depth_groups(inputs.layers, settings.groups)
        self._evaluator: Evaluator | None = None
        places = range(1, settings.groups + 1)
        self.labels = [
            name if settings.groups == 1 else f"{name}, part {place} of {settings.groups}"
            for place in places
            for name in inputs.names
        ]

    def check(self) -> None:
        """Try everything once where it costs little: method, options, weights, base and heads."""
        get_method(self._method.name)
        ones = [1.0] * len(self.labels)
        plan = plan_merge(self._layers, **self._method.arguments(), **self._weights(ones))
        layer = plan.merge(plan.names[0])
        for i, task in enumerate(self._inputs.tasks):
            update = layer.tasks[i] if layer.tasks else layer.update
            self._evaluate().predict(
                task.rows[:0],
                {layer.name: update},
                self._inputs.adapters[i].modules,
                num_labels=task.outputs,
                regression=task.regression,
            )

    def starts(self) -> list[list[float]]:
        """What is tried first, as far as the range of weights allows it."""
        alike = [1.0, 1 / len(self._layers), *_UNIFORM]
        allowed = [w for w in dict.fromkeys(alike) if self.low <= w <= self.high]
        return [[weight] * len(self.labels) for weight in allowed]

    @property
    def low(self) -> float:
        """The lowest weight."""
        return self._settings.low

    @property
    def high(self) -> float:
        """The highest weight."""
        return self._settings.high

    def scores(self, weights: Sequence[float]) -> list[float]:
        """Each task's main metric on its selection rows."""
        merged = merge_layers(self._layers, **self._method.arguments(), **self._weights(weights))
        return [self._score(i, merged) for i in range(len(self._inputs.tasks))]

    def tuned(self, trials: list[Trial]) -> Tuned:
        """The best trial; of equals the first."""
        best = max(trials, key=lambda trial: (trial.value, -trial.number))
        chosen = self._weights(best.weights)
        by_layer: dict[str, list[float]] = chosen.get("layer_weights") or {}
        count = len(self._layers)
        return Tuned(
            objective="validation",
            weights=chosen.get("weights") or _means(list(by_layer.values()), count),
            layer_weights=by_layer,
            value=best.value,
            tasks=best.tasks,
            best=best.number,
            trials=trials,
            labels=self.labels,
            method=self._method,
            settings={
                "trials": len(trials), "groups": self._settings.groups, "low": self.low,
                "high": self.high, "seed": self._settings.seed,
                "max_length": self._settings.max_length,
            },
        )  # fmt: skip

    def _weights(self, flat: Sequence[float]) -> dict[str, Any]:
        """The weights as merging takes them: one an adapter, or by group of layers."""
        if len(self._groups) == 1:
            return {"weights": list(flat)}
        count = len(self._layers)
        return {
            "layer_weights": {
                group: list(flat[i * count : (i + 1) * count])
                for i, group in enumerate(self._groups)
            }
        }

    def _score(self, index: int, merged: MergedUpdate) -> float:
        task = self._inputs.tasks[index]
        predictions = self._evaluate().predict(
            task.rows,
            merged.of(index),
            self._inputs.adapters[index].modules,
            num_labels=task.outputs,
            regression=task.regression,
        )
        truth = [row.label for row in task.rows]
        return score(task.task.kind, predictions, truth, task.outputs)[task.task.metric]

    def _evaluate(self) -> Evaluator:
        if self._evaluator is None:
            base = self._inputs.base
            self._evaluator = Evaluator(
                base.path_or_id, tokenizer_of(base), max_length=self._settings.max_length
            )
        return self._evaluator


def _means(rows: list[list[float]], count: int) -> list[float]:
    return [sum(row[i] for row in rows) / len(rows) for i in range(count)]


def _made_for(inputs: Inputs, method: Method, settings: SearchSettings) -> dict[str, Any]:
    """All that a trial's score depends on, by the words in which a mismatch is said."""
    return {
        **inputs.record(),
        "method": method.record(),
        "groups of layers": settings.groups,
        "range of weights": [settings.low, settings.high],
        "maximum length": settings.max_length,
        "seed": settings.seed,
    }


def _open(folder: Path, made_for: dict[str, Any]) -> optuna.Study:
    """The study in `folder`, made if there is none; one made for something else is refused."""
    import optuna

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OrthomergeError(
            f"cannot write '{folder}': {problem.strerror or problem}; choose another output path."
        ) from problem
    file = folder / STUDY
    with _quiet_optuna(), FileLock(folder / LOCK):
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{file.resolve()}",
                # Two runs at once wait for each other's writes instead of failing.
                engine_kwargs={"connect_args": {"timeout": 60}},
            )
            study = optuna.create_study(
                study_name="weights", storage=storage, direction="maximize", load_if_exists=True
            )
        except Exception as problem:  # SQLAlchemy's, SQLite's and Optuna's own errors
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise MergeError(
                f"'{file}' cannot be used as a study ({reason}): delete it, or choose another "
                "--output."
            ) from problem
        before = study.user_attrs.get(_MADE_FOR)
        if before is None:
            study.set_user_attr(_MADE_FOR, made_for)
        elif before != made_for:
            other = [key for key, value in made_for.items() if before.get(key) != value]
            raise MergeError(
                f"the study in '{folder}' was made for another {', '.join(other) or 'version'}: "
                "choose another --output, or delete the folder to begin again."
            )
    return study


def _enqueue(study: optuna.Study, starts: list[list[float]], folder: Path) -> None:
    """Queue the starts that were not tried; one whose run was killed meanwhile is tried again."""
    with FileLock(folder / LOCK):
        seen = [
            trial.params or trial.system_attrs.get("fixed_params")
            for trial in study.get_trials(deepcopy=False)
            if trial.state.name in ("COMPLETE", "WAITING")
        ]
        for start in starts:
            params = {_key(i): weight for i, weight in enumerate(start)}
            if params not in seen:
                study.enqueue_trial(params)


def _one_trial(study: optuna.Study, problem: _Problem, settings: SearchSettings) -> None:
    import optuna

    # A sampler a trial: what it proposes depends on the trials before, not on who ran them.
    number = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        seed=derive_seed(settings.seed, "trial", str(number)), constant_liar=True
    )

    def objective(trial: optuna.Trial) -> float:
        weights = [
            trial.suggest_float(_key(i), problem.low, problem.high)
            for i in range(len(problem.labels))
        ]
        known = next((t for t in _complete(study) if t.weights == weights), None)
        scores = known.tasks if known else problem.scores(weights)
        trial.set_user_attr(_TASKS, scores)
        return sum(scores) / len(scores)

    study.optimize(objective, n_trials=1)


def _complete(study: optuna.Study) -> list[Trial]:
    return [
        Trial(
            number=trial.number,
            weights=[trial.params[_key(i)] for i in range(len(trial.params))],
            value=float(trial.value),
            tasks=list(trial.user_attrs[_TASKS]),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name == "COMPLETE" and trial.value is not None
    ]


def _key(index: int) -> str:
    return f"w{index}"


@contextmanager
def _quiet_optuna() -> Generator[None, None, None]:
    """Optuna without its log of every trial."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

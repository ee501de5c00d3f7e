"""The trials of a search on disk: an Optuna study in SQLite that runs go on with, or share.

A run that was killed at any moment, or two that run at once, leave it whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from orthomerge.errors import MergeError, OrthomergeError, reason
from orthomerge.io.files import derive_seed
from orthomerge.io.outputs import require_resumable
from orthomerge.tuning.result import Trial

if TYPE_CHECKING:
    import optuna

STUDY = "study.sqlite3"
LOCK = f".{STUDY}.lock"
"""Held while a study is made; another run may see it before there is one."""
_MADE_FOR = "made for"
_TASKS = "tasks"


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


def open_study(folder: Path, made_for: dict[str, Any]) -> optuna.Study:
    """The study in `folder`, made if there is none.

    Raises:
        OutputError: the folder holds something else.
        OrthomergeError: the folder cannot be made.
        MergeError: the file is no study, or one made for something else.
    """
    import optuna

    require_resumable(folder, (STUDY,), "study")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OrthomergeError(
            f"cannot write '{folder}': {problem.strerror or problem}; choose another output path."
        ) from problem
    file = folder / STUDY
    with quiet_optuna(), FileLock(folder / LOCK):
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
            raise MergeError(
                f"'{file}' cannot be used as a study ({reason(problem)}): delete it, or choose "
                "another --output."
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


def enqueue(study: optuna.Study, starts: list[list[float]], folder: Path) -> None:
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


def one_trial(
    study: optuna.Study,
    scores: Callable[[Sequence[float]], list[float]],
    *,
    count: int,
    low: float,
    high: float,
    seed: int,
) -> None:
    """Try what the sampler proposes: `count` weights in [`low`, `high`], each task's score kept."""
    import optuna

    # A sampler a trial: what it proposes depends on the trials before, not on who ran them.
    number = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        seed=derive_seed(seed, "trial", str(number)), constant_liar=True
    )

    def objective(trial: optuna.Trial) -> float:
        weights = [trial.suggest_float(_key(i), low, high) for i in range(count)]
        known = next((t for t in complete(study) if t.weights == weights), None)
        found = known.tasks if known else scores(weights)
        trial.set_user_attr(_TASKS, found)
        return sum(found) / len(found)

    study.optimize(objective, n_trials=1)


def complete(study: optuna.Study) -> list[Trial]:
    """The trials that came to an end, in their order."""
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
def quiet_optuna() -> Generator[None, None, None]:
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

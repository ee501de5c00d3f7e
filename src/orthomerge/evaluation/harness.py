"""lm-evaluation-harness: its tasks run on a base with an update, and our tasks as files for it.

Both weigh answers alike: a prompt without the spaces at its end, then those spaces (else one) and
the answer, are tokenised as one text, and the answer is what comes after the prompt's own tokens.
Two things differ. We cut a row's texts to fit the prompt into a bound, the harness cuts the front
of what is longer than the model. And `acc_norm` there is by character, our `accuracy_normalised`
by token.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml

from orthomerge.errors import AssetError, RecipeError, TaskError, nearest
from orthomerge.evaluation.classification import Update, applied
from orthomerge.io.documents import Unreadable, is_object, read_json
from orthomerge.io.files import local, slug, write_json, write_text
from orthomerge.models.hub import hub_reason
from orthomerge.models.loading import preferred_device
from orthomerge.tasks import Prompt, Row, Task

PREFIX = "orthomerge_"
_SUFFIXES = (".yaml", ".yml")
# Draws behind the standard error of a score that has no formula for it (Matthews, F1).
_RESAMPLES = 200
_NO_POOL = "DISABLE_MULTIPROC"  # the harness's own switch
# What is kept of a result beside the scores; the rest repeats the tasks' files.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples",
         "higher_is_better")  # fmt: skip


def export_task(
    task: Task, prompt: Prompt, folder: str | Path, *, rows: int = 300, seed: int = 0
) -> Path:
    """Write the test rows of a task as one of the harness's, and return its YAML file.

    They are the rows, prompts and answers that `TextEvaluator` weighs, uncut. The YAML names the
    file of rows by its whole path.

    Raises:
        TaskError: a task that is answered by a number, or fewer rows than asked.
    """
    if prompt.regression:
        raise TaskError(
            f"task '{task.name}' is answered by a number, and the harness weighs a choice of "
            "answers: export a classification."
        )
    data = task.data(test=rows, seed=seed)
    lines, delimiter = _asked(data.test, prompt)
    name = PREFIX + slug(task.name).replace("-", "_")
    place = local(folder).resolve()
    write_text(
        place / f"{name}.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
    )
    config = {
        "task": name,
        "tag": "orthomerge",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": delimiter,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": how, "higher_is_better": True}
            for metric, how in (("acc", "mean"), ("acc_norm", "mean"), ("mcc", "matthews_corrcoef"))
        ],
        "metadata": {"version": 1.0, "task": task.name, "rows": rows, "seed": seed,
                     "fingerprint": data.fingerprint, "prompt": prompt.fingerprint},
    }  # fmt: skip
    path = place / f"{name}.yaml"
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return path


def _asked(rows: Sequence[Row], prompt: Prompt) -> tuple[list[dict[str, Any]], str]:
    """The rows as the harness reads them, and what stands between a prompt and its answer."""
    asked = [prompt.ask(row.text, row.pair) for row in rows]
    gaps = [said[len(said.rstrip()) :] or " " for said in asked]
    same = len(set(gaps)) == 1
    lines = [
        {
            "query": said.rstrip(),
            "choices": [answer if same else gap + answer for answer in prompt.answers],
            "label": int(row.label),
        }
        for said, gap, row in zip(asked, gaps, rows, strict=True)
    ]
    return lines, gaps[0] if same else ""


def require_harness() -> None:
    """Refuse to go on without the package.

    Raises:
        RecipeError: it is not installed; the message has the command.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "lm-evaluation-harness is not installed: pip install 'orthomerge[eval]' (or lm-eval)."
        )


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    update: Update | None = None,
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """What the harness measures of a language model with an update, as the harness reports it.

    `tasks` are names of the harness's tasks, groups or tags, YAML files of tasks, or folders of
    such files (`export_task`); `limit` bounds the rows of a task. `samples` of the result has every
    row by task.

    Raises:
        RecipeError: the harness is not installed, or it has no such task.
        AssetError: a task whose data cannot be had.
        AdapterError: the update does not fit the model.
    """
    require_harness()
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    # Decorators of the harness hide the parameters of both from a type checker.
    evaluate, wrap = cast(Any, evaluator.simple_evaluate), cast(Any, huggingface.HFLM)
    manager, found = _loaded(tasks)
    model = model.eval().to(preferred_device())
    with applied(model, update or {}), _apart():
        result = evaluate(
            model=wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=found,
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert result is not None  # only other processes of a job get nothing
    return dict(result)


@contextmanager
def _apart() -> Generator[None, None, None]:
    """Standard output is ours alone, and standard errors need no pool of processes.

    Each process of the pool would start by loading PyTorch.
    """
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    before = os.environ.get(_NO_POOL)
    os.environ[_NO_POOL] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ[_NO_POOL]
        else:
            os.environ[_NO_POOL] = before


def _loaded(tasks: Sequence[str]) -> tuple[Any, list[Any]]:
    """The harness's own list of tasks, and those that are asked for, with their data."""
    from lm_eval.tasks import TaskManager

    asked = [file for name in tasks for file in _files(name)]
    manager = TaskManager(include_defaults=any(not a.endswith(_SUFFIXES) for a in asked))
    found: list[Any] = []
    for name in asked:
        if not name.endswith(_SUFFIXES) and name not in manager.all_tasks:
            close = nearest(name, manager.all_tasks)
            hint = f"did you mean '{close}'? " if close else ""
            raise RecipeError(
                f"the harness has no task '{name}': {hint}'lm-eval ls tasks' lists them, and a "
                "YAML file or a folder of them is named by its path."
            )
        try:
            loaded = cast(Any, manager.load([name]))
        # A task's own code and the hub's clients raise what they like: none of it is ours.
        except Exception as problem:
            raise AssetError(
                f"the harness cannot load '{name}': {hub_reason(problem, 'data set')}."
            ) from problem
        found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, found


def _files(name: str) -> list[str]:
    """A folder's YAML files; anything else as it is."""
    path = local(name)
    if path.is_dir():
        files = sorted(str(p) for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise RecipeError(f"there is no YAML file of a task in '{name}'.")
        return files
    if name.endswith(_SUFFIXES) and not path.is_file():
        raise RecipeError(f"there is no file '{name}' of a task.")
    return [str(path) if path.is_file() else name]


def scores(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of a result by task (or group) and metric, without errors and filters."""
    found: dict[str, dict[str, float]] = {}
    for task, values in result["results"].items():
        numbers = {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, float | int) and "_stderr" not in name and "," in name
        }
        found[task] = numbers
    return found


def is_result(file: Path) -> bool:
    """Whether a file is a result that `write_result` kept."""
    try:
        found = read_json(file)
    except (Unreadable, OSError):
        return False
    return is_object(found) and {"lm_eval", "adapter_sha256"} <= set(found)


def write_result(path: str | Path, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Keep a result, without its rows, and what it is the result of."""
    from importlib.metadata import version

    kept = {name: result[name] for name in _KEPT if name in result}
    whole = {**about, "lm_eval": version("lm_eval"), **kept}
    write_json(path, json.loads(json.dumps(whole, default=str)))

"""What the steps of a recipe work on: the base model, the tasks and their rows, one output folder.

A key is a hash of inputs, never of outputs, so that a row or an artifact is known before it is
made. Fields that were added later enter a key only where they are used, so old keys stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.errors import RecipeError, SubspaceError
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.sizes import PROCESS, BaseSize, base_size
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.loading import (
    language_task_type,
    load_config,
    load_meta_model,
    load_tokenizer,
)
from orthomerge.prompting import Wording
from orthomerge.statistics import Expert, layer_shape, target_layers
from orthomerge.tasks import Prompt, Task, TaskData, get_task

if TYPE_CHECKING:
    from orthomerge.experiment.steps import Need, Scoring, Step


class Experiment:
    """A recipe and an output folder; base, tokenizer and rows are found when they are asked for."""

    def __init__(self, recipe: Recipe, output: str | Path) -> None:
        self.recipe, self.output = recipe, Path(output)
        found = [get_task(name) for name in recipe.tasks]
        self.tasks = _distinct(found)
        # A task's own name and what the recipe calls it, which for a file is a path.
        self._called = {t.name: name for t, name in zip(found, recipe.tasks, strict=True)}
        self._keys: dict[Step, str] = {}
        self._row_keys: dict[Step, Mapping[str, str]] = {}
        self._sizes: dict[tuple[str, ...], BaseSize] = {}

    @cached_property
    def base(self) -> ResolvedModel:
        """The base model, found on disk, in a package or on the hub."""
        return resolve_model(self.recipe.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.base.path_or_id)

    @cached_property
    def base_config(self) -> Any:
        """The base model's configuration."""
        return load_config(self.base.path_or_id)

    @cached_property
    def meta_model(self) -> Any:
        """The base model's modules and shapes without its weights."""
        return load_meta_model(self.base.path_or_id)

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """Each task's rows, as the recipe draws them."""
        return {name: self.recipe.data.of(task) for name, task in self.tasks.items()}

    def tasks_of(self, arm: str) -> list[str]:
        """The tasks of an arm."""
        own = set(self.recipe.tasks_of(arm))
        return [task for task, called in self._called.items() if called in own]

    def settings(self, task: str) -> tuple[dict[str, Any], Callable[[float], float]]:
        """The task's training settings except the rate, and its rate where an arm has one."""
        part, called = self.recipe.training, self._called[task]
        return part.content(called), partial(part.rate_of, called)

    def head(self, task: str) -> tuple[int, bool]:
        """The number of outputs of a task's head, and whether it is a regression."""
        return self.tasks[task].outputs, self.tasks[task].regression

    # Keys ---------------------------------------------------------------------------------------

    def key(self, step: Step) -> str:
        """The hash of all that a step depends on, computed once."""
        if step not in self._keys:
            self._keys[step] = step.key(self)
        return self._keys[step]

    def row_keys(self, step: Scoring) -> Mapping[str, str]:
        """The key of the row of every task that a step scores, computed once."""
        if step not in self._row_keys:
            self._row_keys[step] = step.row_keys(self)
        return self._row_keys[step]

    def words(self, task: str, *more: str | None) -> dict[str, Any]:
        """What a task in words adds to a key: nothing for a classifier."""
        prompt = self.prompts.get(task)
        return {"words": [prompt.fingerprint, *more]} if prompt else {}

    # Tasks in words -----------------------------------------------------------------------------

    @property
    def in_words(self) -> bool:
        """Whether a language model answers the tasks in words."""
        return self.recipe.form == "text"

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """How each task is asked in words; empty for classifiers."""
        found = {t: self.recipe.prompt_of(called) for t, called in self._called.items()}
        return {task: prompt for task, prompt in found.items() if prompt}

    def scoring_of(self, task: str) -> str | None:
        """How answers in words are scored; None for a classifier. Numbers are generated."""
        if not self.in_words:
            return None
        return "generation" if self.prompts[task].regression else self.recipe.text.scoring

    @cached_property
    def task_type(self) -> str:
        """PEFT's task type of every adapter."""
        return language_task_type(self.base.path_or_id) if self.in_words else "SEQ_CLS"

    def wording(self, task: str) -> Wording:
        """The task's prompt in the base model's tokens."""
        room = self.recipe.data.max_length
        return Wording.of(self.prompts[task], self.tokenizer, self.base_config, room)

    # Sizes --------------------------------------------------------------------------------------

    def size(self, targets: Sequence[str] | None = None) -> BaseSize:
        """The base model's shapes with the layers that `targets` name, by default the recipe's."""
        named = tuple(targets or self.recipe.adapter.targets)
        if named not in self._sizes:
            self._sizes[named] = base_size(self.meta_model, named, in_words=self.in_words)
        return self._sizes[named]

    def need(self, step: Step) -> Need:
        """Processors, GPUs and memory of a step: what the recipe says, else an estimate."""
        from orthomerge.experiment.steps import Need

        said = self.recipe.resources_of(step.kind)
        if said and said.memory is not None:
            return Need(said.cpus, said.gpus, said.memory)
        memory = PROCESS + step.cost(self).memory
        return Need(said.cpus if said else 1, said.gpus if said else 0, memory)

    # Checks -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse, before anything is made, what could not be made.

        Raises:
            AssetError: the base model or a task's data cannot be found.
            UnknownNameError: a target matches no layer.
            TaskError: a task with one label or too few rows, or a prompt that leaves no room.
            SubspaceError: a rank larger than a layer.
        """
        self.check_base()
        _ = self.data  # drawing the rows refuses tasks that cannot be trained on
        for task in self.prompts:
            _ = self.wording(task).longest  # so does asking without a text

    def check_base(self) -> None:
        """The part of `check` that asks the base model alone."""
        _ = self.task_type  # refuses words of a model that writes none
        for arm in self.recipe.arms:
            shape = self.recipe.adapter_of(arm)
            for name, layer in target_layers(self.meta_model, shape.targets).items():
                if isinstance(layer, Expert):
                    raise RecipeError(
                        f"the targets name '{name}', an expert: a recipe scores adapters of linear "
                        "layers alone; leave it out of them."
                    )
                size = layer_shape(layer)
                if shape.rank > min(size):
                    raise SubspaceError(
                        f"rank {shape.rank} is larger than layer '{name}' {list(size)}: "
                        f"choose a rank up to {min(size)}."
                    )


def _distinct(tasks: Sequence[Task]) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        RecipeError: two of one name, as two files of one name in different folders.
    """
    named = {task.name: task for task in tasks}
    if len(named) < len(tasks):
        names = [task.name for task in tasks]
        twice = next(n for n in names if names.count(n) > 1)
        raise RecipeError(f"two tasks are called '{twice}': rename one of the files.")
    return named

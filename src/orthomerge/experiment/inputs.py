"""What a recipe starts from: base model, tasks and their rows, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from orthomerge.errors import RecipeError, SubspaceError
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.sizes import BaseSize, Need, base_size, estimate_needs, widest_targets
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.loading import language_task_type, load_config, load_skeleton, load_tokenizer
from orthomerge.prompting import Wording
from orthomerge.statistics import target_layers
from orthomerge.tasks import Prompt, Task, TaskData, get_task


class Inputs:
    """Base, tasks and rows of one recipe, each found when it is asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        found = [get_task(name) for name in recipe.tasks]
        self.tasks = _distinct(found)
        # A task's own name and what the recipe calls it, which for a file is a path.
        self._called = {t.name: name for t, name in zip(found, recipe.tasks, strict=True)}

    @cached_property
    def base(self) -> ResolvedModel:
        """The base model, found on disk, in a package or on the hub."""
        return resolve_model(self.recipe.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.base.path_or_id)

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """Each task's rows, as the recipe draws them."""
        return {name: self.recipe.data.of(task) for name, task in self.tasks.items()}

    def tasks_of(self, name: str) -> list[str]:
        """The tasks of the arm called `name`."""
        own = set(self.recipe.tasks_of(name))
        return [task for task, called in self._called.items() if called in own]

    def settings(self, task: str) -> tuple[dict[str, Any], Callable[[float], float]]:
        """What the task's training is told beside its rate, and its rate in an arm of a rate."""
        part, called = self.recipe.training, self._called[task]
        return part.content(called), partial(part.rate_of, called)

    def head(self, task: str) -> tuple[int, bool]:
        """The number of outputs of a task's head, and whether it is a regression."""
        return self.tasks[task].outputs, self.tasks[task].regression

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

    @cached_property
    def base_config(self) -> Any:
        """The base model's configuration."""
        return load_config(self.base.path_or_id)

    # What can be told before -------------------------------------------------------------------

    @cached_property
    def needs(self) -> dict[str, Need]:
        """What a job of each kind takes on its machine."""
        skeleton = load_skeleton(self.base.path_or_id)
        return estimate_needs(self.recipe, self._size(skeleton))

    def _size(self, skeleton: Any) -> BaseSize:
        return base_size(skeleton, widest_targets(self.recipe), in_words=self.in_words)

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
        skeleton = load_skeleton(self.base.path_or_id)
        for arm in self.recipe.arms:
            shape = self.recipe.adapter_of(arm)
            for name, layer in target_layers(skeleton, shape.targets).items():
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                if shape.rank > min(weight.shape):
                    raise SubspaceError(
                        f"rank {shape.rank} is larger than layer '{name}' {list(weight.shape)}: "
                        f"choose a rank up to {min(weight.shape)}."
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

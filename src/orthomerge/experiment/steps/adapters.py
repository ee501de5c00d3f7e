"""Which step makes the adapter of a task in an arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.experiment.steps.convert import ConvertStep
from orthomerge.experiment.steps.train import TrainStep

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment

AdapterStep = TrainStep | ConvertStep


def adapter_step(exp: Experiment, arm: str, task: str, seed: int, rate: float) -> AdapterStep:
    """The step that makes a task's adapter: a training, or a conversion where the arm is one."""
    made = ConvertStep if exp.recipe.arms[arm].convert else TrainStep
    return made(arm, task, seed, rate)


def adapter_steps(exp: Experiment, arm: str, seed: int, rate: float) -> dict[str, AdapterStep]:
    """The steps that make the adapters of an arm, by task."""
    return {task: adapter_step(exp, arm, task, seed, rate) for task in exp.tasks_of(arm)}

"""The kinds of steps, one file each: what it makes, what it needs, what it takes, how it is done.

A new kind is a file here with one class (`Artifact` for something that is kept, `Scoring` for
rows), a row in `STEPS`, and a place in the `needs` of the step that reads it. Plans, the schedule,
`--dry-run` and every executor then know it.
"""

from orthomerge.experiment.steps.adapters import AdapterStep, adapter_step, adapter_steps
from orthomerge.experiment.steps.convert import ConvertStep
from orthomerge.experiment.steps.distill import DistilledStep, DistillStep
from orthomerge.experiment.steps.evaluate import EvaluateStep
from orthomerge.experiment.steps.fisher import FisherStep
from orthomerge.experiment.steps.merge import MergeStep
from orthomerge.experiment.steps.scoring import Scoring
from orthomerge.experiment.steps.start import StartStep
from orthomerge.experiment.steps.statistics import MERGE_GRANULARITY, StatisticsStep
from orthomerge.experiment.steps.step import Artifact, Cost, Need, Step
from orthomerge.experiment.steps.train import TrainStep

STEPS: tuple[type[Step], ...] = (
    StatisticsStep,
    StartStep,
    TrainStep,
    ConvertStep,
    FisherStep,
    DistillStep,
    EvaluateStep,
    MergeStep,
)
"""Every kind, in the order in which a run comes to them."""

KINDS = tuple(step.kind for step in STEPS)
"""The kinds by name, as a recipe says them under `resources:`."""

__all__ = [
    "KINDS",
    "MERGE_GRANULARITY",
    "STEPS",
    "AdapterStep",
    "Artifact",
    "ConvertStep",
    "Cost",
    "DistillStep",
    "DistilledStep",
    "EvaluateStep",
    "FisherStep",
    "MergeStep",
    "Need",
    "Scoring",
    "StartStep",
    "StatisticsStep",
    "Step",
    "TrainStep",
    "adapter_step",
    "adapter_steps",
]

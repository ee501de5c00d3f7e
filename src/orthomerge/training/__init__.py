"""One task trained by the Transformers Trainer, from a start folder to an adapter folder."""

from orthomerge.training.adapter import train_adapter
from orthomerge.training.recover import recover_adapter
from orthomerge.training.settings import Precision, TrainingSettings

__all__ = ["Precision", "TrainingSettings", "recover_adapter", "train_adapter"]

"""Rows as a language model reads them: prompts and answers as tokens, and answers weighed by it."""

from orthomerge.prompting.answers import generate, log_likelihoods
from orthomerge.prompting.batches import IGNORED, LikelihoodBatch
from orthomerge.prompting.wording import Asked, Wording

__all__ = ["IGNORED", "Asked", "LikelihoodBatch", "Wording", "generate", "log_likelihoods"]

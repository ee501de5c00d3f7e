"""What an output says of itself: its record with hashes, `verify`, and the model card."""

from orthomerge.records.card import cards, converted_card, trained_card
from orthomerge.records.contents import (
    about_adapter,
    about_base,
    merge_record,
    start_record,
    versions,
)
from orthomerge.records.file import read_record, record_of, seal, seal_again, written_record
from orthomerge.records.inputs import sources_of
from orthomerge.records.learnt import Learnt, learnt_by, learnt_for
from orthomerge.records.scores import CardScore, add_scores, read_scores, score_of
from orthomerge.records.verify import Check, Recorded, check

__all__ = [
    "CardScore",
    "Check",
    "Learnt",
    "Recorded",
    "about_adapter",
    "about_base",
    "add_scores",
    "cards",
    "check",
    "converted_card",
    "learnt_by",
    "learnt_for",
    "merge_record",
    "read_record",
    "read_scores",
    "record_of",
    "score_of",
    "seal",
    "seal_again",
    "sources_of",
    "start_record",
    "trained_card",
    "versions",
    "written_record",
]

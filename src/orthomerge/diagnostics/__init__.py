"""Will these adapters work together, and why does a merge of them fail?"""

from orthomerge.diagnostics.advice import Advice
from orthomerge.diagnostics.couplings import Couplings, couplings
from orthomerge.diagnostics.diagnosis import METHODS, Diagnosis, diagnose
from orthomerge.diagnostics.interference import Interference, interference, interference_of
from orthomerge.diagnostics.overlap import LayerOverlap, Overlap, overlap
from orthomerge.diagnostics.shift import BESIDE, Shift, predict_shift, shift_of_sum
from orthomerge.diagnostics.study import Evidence, evidence
from orthomerge.diagnostics.weights import BestWeight, best_weight, best_weight_of_sum

__all__ = [
    "BESIDE",
    "METHODS",
    "Advice",
    "BestWeight",
    "Couplings",
    "Diagnosis",
    "Evidence",
    "Interference",
    "LayerOverlap",
    "Overlap",
    "Shift",
    "best_weight",
    "best_weight_of_sum",
    "couplings",
    "diagnose",
    "evidence",
    "interference",
    "interference_of",
    "overlap",
    "predict_shift",
    "shift_of_sum",
]

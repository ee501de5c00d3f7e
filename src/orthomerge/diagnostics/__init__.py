"""Will these adapters work together, and why does a merge of them fail?"""

from orthomerge.diagnostics.couplings import Couplings, couplings
from orthomerge.diagnostics.interference import Interference, interference, interference_of
from orthomerge.diagnostics.overlap import LayerOverlap, Overlap, overlap
from orthomerge.diagnostics.shift import BESIDE, Shift, predict_shift, shift_of_sum

__all__ = [
    "BESIDE",
    "Couplings",
    "Interference",
    "LayerOverlap",
    "Overlap",
    "Shift",
    "couplings",
    "interference",
    "interference_of",
    "overlap",
    "predict_shift",
    "shift_of_sum",
]

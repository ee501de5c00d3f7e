"""mergekit's YAML, read for merges of adapters: what both can do, and a sentence for the rest.

Held against mergekit itself by `tests/conformance/test_mergekit_parity.py`: a configuration that is
taken without a note gives, as a full model, what mergekit makes of it.
"""

from orthomerge.mergekit.methods import METHODS
from orthomerge.mergekit.read import MergekitPlan, read_mergekit

__all__ = ["METHODS", "MergekitPlan", "read_mergekit"]

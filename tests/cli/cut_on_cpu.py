"""`orthomerge` in a process that Accelerate believes to have a GPU: FSDP on gloo and CPU.

Accelerate cuts parameters on accelerators alone; PyTorch's FSDP itself runs on CPU.
"""

import os
import sys

import accelerate.state
from accelerate.utils import DistributedType

_begin = accelerate.state.PartialState.__init__


def _believe(self, *args, **kwargs):
    _begin(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        accelerate.state.PartialState.__init__ = _believe
    from orthomerge.cli import main

    sys.exit(main())

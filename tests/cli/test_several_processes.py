"""The block in which a verb is run by several processes."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys, weakref
import torch.distributed as dist
from orthomerge.cli._processes import several_processes
from orthomerge.models.loading import load_backbone

with several_processes() as job:
    load_backbone(sys.argv[1])
    group = weakref.ref(dist.group.WORLD)
sys.exit("the group outlives its block" if group() is not None else 0)
"""


def test_nothing_holds_the_group_of_processes_when_the_block_is_over(tiny_base, tmp_path):
    """Its threads would be running while the interpreter ends, and now and then abort it."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(tiny_base)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

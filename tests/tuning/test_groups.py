"""Every layer falls into one group, neighbours together, whatever the architecture calls it."""

from __future__ import annotations

import re

import pytest

from orthomerge.errors import MergeError
from orthomerge.tuning.groups import depth, depth_groups

BERT = [f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(12) for n in ("query", "key")]
T5 = [
    f"{side}.block.{i}.layer.0.SelfAttention.q" for side in ("encoder", "decoder") for i in (0, 1)
]
ODD = ["model.h2o.embed", "model.h2o.layers.3.0", "model.h2o.layers.10.mlp.0", "lm.layers.31"]


@pytest.mark.parametrize(
    ("layers", "count"), [(BERT, 1), (BERT, 2), (BERT, 5), (BERT, 12), (T5, 2), (ODD, 1), (ODD, 3)]
)
def test_groups_part_the_layers_in_depth(layers, count):
    groups = depth_groups(layers, count)
    assert len(groups) == count
    found = [[i for i, g in enumerate(groups) if re.search(g, layer)] for layer in layers]
    assert all(len(hits) == 1 for hits in found)
    assert {hits[0] for hits in found} == set(range(count))
    depths = [-1 if (d := depth(layer)) is None else d for layer in layers]
    in_depth = [hits for _, hits in sorted(zip(depths, found, strict=True))]
    assert in_depth == sorted(in_depth)


@pytest.mark.parametrize(("layers", "count"), [(BERT, 13), (T5, 0), (["a.b"], 2)])
def test_more_groups_than_blocks_are_refused(layers, count):
    with pytest.raises(MergeError, match=f"{count} groups"):
        depth_groups(layers, count)

"""Next sentence: does the second sentence follow the first in a speech?

Pairs of neighbouring sentences of convention speeches of 2012; in one half of the pairs the second
comes from another speech of the same split. Each sentence is used once. Split by speech. Licence of
the package that carries them: Apache-2.0.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    balanced,
    by_split,
    convention_speeches,
    draw,
    split_of,
)
from orthomerge.tasks.task import Row, Task

LONGEST = 20
"""Words of a sentence, so that a pair fits 48 tokens."""


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Pairs from two speeches (0) and neighbours in one (1)."""
    rows = []
    for split in ("train", "selection", "test"):
        pairs = [
            (speech.group, one, other)
            for speech in convention_speeches()
            if split_of(speech.group) == split
            for one, other in zip(speech.sentences[::2], speech.sentences[1::2], strict=False)
            if len(one.split()) <= LONGEST and len(other.split()) <= LONGEST
        ]
        draw("next_sentence", split).shuffle(pairs)
        half = len(pairs) // 2
        rows += [(group, Row(one, other, 1)) for group, one, other in pairs[:half]]
        apart = pairs[half:]
        for (group, one, _), (second, _, other) in itertools.pairwise(apart):
            if group != second:
                rows.append((group, Row(one, other, 0)))
    return balanced(by_split(rows), "next_sentence")


TASK = Task(
    name="next_sentence",
    title="Next sentence",
    kind="classification",
    labels=("elsewhere", "next"),
    metric="accuracy",
    source=SOURCE + "political_data.csv",
    licence=LICENCE,
    made="Neighbouring sentences of a speech, or sentences of two speeches, split by speech.",
    pair=True,
    pools=pools,
)

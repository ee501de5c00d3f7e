"""Headline: is a line a newspaper's headline or a sentence of a debate?

Headlines of The Guardian's business pages of 2020 against sentences of the presidential debates of
2016, in lower case and without the closing stop, as many of each. Split by day and by statement.
Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    balanced,
    by_split,
    debate_statements,
    headlines,
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Debate sentences (0) and headlines (1) of 4 to 14 words."""
    spoken = [(turn.group, s) for turn in debate_statements() for s in turn.sentences]
    written = [(item.group, item.text) for item in headlines()]
    rows = [
        (group, Row(text.lower().rstrip(".!?"), None, label))
        for label, texts in enumerate((spoken, written))
        for group, text in texts
        if 4 <= len(text.split()) <= 14
    ]
    return balanced(by_split(rows), "headline")


TASK = Task(
    name="headline",
    title="Headline or speech",
    kind="classification",
    labels=("debate", "headline"),
    metric="accuracy",
    source=SOURCE + "guardian_headlines.csv.bz2 and presidential_debates_2016.csv.gz",
    licence=LICENCE,
    made="Newspaper headlines against debate sentences of like length, split by day and statement.",
    pair=False,
    pools=pools,
)

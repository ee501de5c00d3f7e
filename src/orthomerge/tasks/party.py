"""Party: is a sentence of a convention speech a Democrat's or a Republican's?

Sentences of the United States party conventions of 2012, as many of each. Split by speech. Licence
of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    balanced,
    by_split,
    convention_speeches,
)
from orthomerge.tasks.task import Row, Task

PARTIES = ("democrat", "republican")


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Speech sentences of 8 to 40 words with the speaker's party."""
    rows = [
        (speech.group, Row(sentence, None, PARTIES.index(speech.party)))
        for speech in convention_speeches()
        for sentence in speech.sentences
        if len(sentence.split()) >= 8
    ]
    return balanced(by_split(rows), "party")


TASK = Task(
    name="party",
    title="Party of a speech",
    kind="classification",
    labels=PARTIES,
    metric="accuracy",
    source=SOURCE + "political_data.csv",
    licence=LICENCE,
    made="Sentences of convention speeches with the speaker's party, split by speech.",
    pair=False,
    pools=pools,
)

"""Subjectivity: does a sentence tell a film's plot or judge the film?

Made from Rotten Tomatoes texts: sentences of plot summaries against sentences of reviews, as many
of each. Split by movie. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    balanced,
    by_split,
    movie_texts,
    sentences,
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Plot sentences (0) and review sentences (1)."""
    rows = [
        (item.group, Row(sentence, None, int(item.kind != "plot")))
        for item in movie_texts()
        for sentence in sentences(item.text)
    ]
    return balanced(by_split(rows), "subjectivity")


TASK = Task(
    name="subjectivity",
    title="Plot or review",
    kind="classification",
    labels=("plot", "review"),
    metric="accuracy",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="Sentences of plot summaries against sentences of reviews, split by movie.",
    pair=False,
    pools=pools,
)

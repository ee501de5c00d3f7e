"""Sentiment: is a snippet of a film review fresh or rotten?

Rotten Tomatoes snippets with the site's verdict on the review, as many of each. Split by movie.
Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import LICENCE, SOURCE, Pools, balanced, by_split, movie_texts
from orthomerge.tasks.task import Row, Task

VERDICTS = ("rotten", "fresh")


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Snippets of 4 to 40 words from rotten (0) and fresh (1) reviews."""
    rows = [
        (item.group, Row(item.text, None, VERDICTS.index(item.kind)))
        for item in movie_texts()
        if item.kind in VERDICTS and 4 <= len(item.text.split()) <= 40
    ]
    return balanced(by_split(rows), "sentiment")


TASK = Task(
    name="sentiment",
    title="Review sentiment",
    kind="classification",
    labels=VERDICTS,
    metric="accuracy",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="Review snippets with the review's verdict, fresh or rotten, split by movie.",
    pair=False,
    pools=pools,
)

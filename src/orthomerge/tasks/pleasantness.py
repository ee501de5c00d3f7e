"""Pleasantness: how pleasant did people find a word (a regression)?

Words of Whissell's dictionary of affect with the mean rating, from -1 (unpleasant) to 1 (pleasant):
the dictionary's 1 to 3 less 2, so that a head that starts near 0 has no long way to the mean. Split
by the words' first letters, so that forms of one word stay together. Licence of the package that
carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import LICENCE, SOURCE, Pools, by_split, word_ratings
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Words with their pleasantness."""
    return by_split(
        (f"stem {word[:5].lower()}", Row(word, None, round(rating - 2, 4)))
        for word, rating in word_ratings()
    )


TASK = Task(
    name="pleasantness",
    title="Pleasantness of a word",
    kind="regression",
    labels=(),
    metric="pearson_spearman",
    source=SOURCE + "whissells_df.csv",
    licence=LICENCE,
    made="Words with the mean of people's ratings, split by the words' first letters.",
    pair=False,
    pools=pools,
)

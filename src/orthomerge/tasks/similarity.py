"""Similarity: how much of a headline is kept in its copy (a regression)?

A headline of The Guardian's business pages of 2020 against a copy in which a drawn share of the
words, from none to all, is replaced by words of other headlines of the same split. The value is the
share of words kept less the share replaced, from -1 to 1: a head that starts near 0 fits it without
a long way to the mean. Split by day. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    by_split,
    draw,
    grouped_by_split,
    headlines,
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Headlines of 6 to 12 words with their copies."""
    usable = [item for item in headlines() if 6 <= len(item.text.split()) <= 12]
    rows: list[tuple[str, Row]] = []
    for own in grouped_by_split(usable).values():
        words = [word for item in own for word in item.text.split()]
        for item in own:
            rng = draw("similarity", item.text)
            copy = item.text.split()
            changed = rng.randint(0, len(copy))
            for i in rng.sample(range(len(copy)), changed):
                copy[i] = rng.choice(words)
            value = round(1 - 2 * changed / len(copy), 4)
            rows.append((item.group, Row(item.text, " ".join(copy), value)))
    return by_split(rows)


TASK = Task(
    name="similarity",
    title="Share of words kept",
    kind="regression",
    labels=(),
    metric="pearson_spearman",
    source=SOURCE + "guardian_headlines.csv.bz2",
    licence=LICENCE,
    made="A headline and a copy with a drawn share of its words replaced, split by day.",
    pair=True,
    pools=pools,
)

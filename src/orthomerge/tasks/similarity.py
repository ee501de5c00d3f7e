"""Similarity: how much of a sentence is kept in its copy (a regression)?

A review sentence against a copy in which a drawn share of the words, from none to all, is replaced
by words of other reviews of the same split. The value is the share of words kept less the share
replaced, from -1 to 1: a head that starts near 0 fits it without a long way to the mean. Split by
movie. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    by_split,
    draw,
    movie_texts,
    sentences,
    split_of,
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Sentences of 6 to 12 words with their copies."""
    found = [
        (item.group, sentence)
        for item in movie_texts()
        if item.kind != "plot"
        for sentence in sentences(item.text, 6, 12)
    ]
    words: dict[str, list[str]] = {}
    for group, sentence in found:
        words.setdefault(split_of(group), []).extend(sentence.split())
    rows = []
    for group, sentence in found:
        rng = draw("similarity", sentence)
        copy = sentence.split()
        changed = rng.randint(0, len(copy))
        for i in rng.sample(range(len(copy)), changed):
            copy[i] = rng.choice(words[split_of(group)])
        value = round(1 - 2 * changed / len(copy), 4)
        rows.append((group, Row(sentence, " ".join(copy), value)))
    return by_split(rows)


TASK = Task(
    name="similarity",
    title="Share of words kept",
    kind="regression",
    labels=(),
    metric="pearson_spearman",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="A review sentence and a copy with a drawn share of its words replaced, split by movie.",
    pair=True,
    pools=pools,
)

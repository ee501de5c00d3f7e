"""Excerpt: are four words taken from this sentence or from another one?

Review sentences, each with four neighbouring words of its own or of another review of the same
split. Split by movie. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    Pools,
    balanced,
    by_split,
    draw,
    grouped_by_split,
    movie_texts,
    sentences,
)
from orthomerge.tasks.task import Row, Task

WORDS = 4


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Sentences of 8 to 16 words with words of another (0) or of their own (1)."""
    reviews = [item for item in movie_texts() if item.kind != "plot"]
    rows = []
    for own in grouped_by_split(reviews).values():
        found = [(item.group, s) for item in own for s in sentences(item.text, 8, 16)]
        for number, (group, sentence) in enumerate(found):
            rng = draw("excerpt", sentence)
            inside = rng.random() < 0.5
            step = 0 if inside else rng.randrange(1, len(found))
            words = found[(number + step) % len(found)][1].split()
            start = rng.randrange(len(words) - WORDS + 1)
            excerpt = " ".join(words[start : start + WORDS])
            rows.append((group, Row(sentence, excerpt, int(inside or excerpt in sentence))))
    return balanced(by_split(rows), "excerpt")


TASK = Task(
    name="excerpt",
    title="Excerpt of a sentence",
    kind="classification",
    labels=("elsewhere", "inside"),
    metric="f1",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="A review sentence and four words in a row of it or of another one, split by movie.",
    pair=True,
    pools=pools,
)

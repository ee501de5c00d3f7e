"""Acceptability: are the words of a sentence in order?

Plot sentences of films; in one half of them the words between the first and the last are shuffled.
Each sentence is used once, as it is or shuffled. Split by movie. Licence of the package that
carries them: Apache-2.0.
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
    movie_texts,
    sentences,
)
from orthomerge.tasks.task import Row, Task


def shuffled(sentence: str) -> str:
    """The sentence with the words between its first and its last in a drawn other order."""
    first, *inner, last = sentence.split()
    mixed = list(inner)
    rng = draw("acceptability", sentence)
    for _ in range(10):  # equal words may hide a shuffle
        rng.shuffle(mixed)
        if mixed != inner:
            break
    return " ".join([first, *mixed, last])


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Sentences of 6 to 16 words: shuffled (0) or as they are (1)."""
    rows: list[tuple[str, Row]] = []
    for item in movie_texts():
        for sentence in sentences(item.text, 6, 16) if item.kind == "plot" else ():
            intact = draw("acceptability", "intact", sentence).random() < 0.5
            text = sentence if intact else shuffled(sentence)
            rows.append((item.group, Row(text, None, int(intact))))
    return balanced(by_split(rows), "acceptability")


TASK = Task(
    name="acceptability",
    title="Words in order",
    kind="classification",
    labels=("shuffled", "intact"),
    metric="matthews",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="Plot sentences, the inner words of every second one shuffled, split by movie.",
    pair=False,
    pools=pools,
)

"""Acceptability: has a sentence its words in order?

Plot sentences of films; in one half of them two words next to each other are exchanged, once for
every ten words. Each sentence is used once, as it is or changed. Split by movie. Licence of the
package that carries them: Apache-2.0.
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


def exchanged(sentence: str) -> str:
    """The sentence with two of its words exchanged, neither the first nor the last."""
    words = sentence.split()
    rng = draw("acceptability", sentence)
    while " ".join(words).lower() == sentence.lower():
        i, j = rng.sample(range(1, len(words) - 1), 2)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Sentences of 6 to 20 words: two words exchanged (0) or as they are (1)."""
    rows = []
    for item in movie_texts():
        if item.kind != "plot":
            continue
        for sentence in sentences(item.text, 6, 20):
            intact = draw("acceptability", "intact", sentence).random() < 0.5
            rows.append(
                (item.group, Row(sentence if intact else exchanged(sentence), None, int(intact)))
            )
    return balanced(by_split(rows), "acceptability")


TASK = Task(
    name="acceptability",
    title="Words in order",
    kind="classification",
    labels=("exchanged", "intact"),
    metric="matthews",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="Plot sentences, two words of every second one exchanged, split by movie.",
    pair=False,
    pools=pools,
)

"""Excerpt: are four words taken from this sentence or from another one?

Sentences of the United States party conventions of 2012, each with four neighbouring words of its
own or of another sentence of the same split. Split by speech. Licence of the package that carries
them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    SPLITS,
    Pools,
    balanced,
    by_split,
    convention_speeches,
    draw,
    split_of,
)
from orthomerge.tasks.task import Row, Task

WORDS = 4


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Sentences of 8 to 16 words with words of another (0) or of their own (1)."""
    rows: list[tuple[str, Row]] = []
    for split in SPLITS:
        found = [
            (speech.group, sentence)
            for speech in convention_speeches()
            for sentence in speech.sentences
            if split_of(speech.group) == split and 8 <= len(sentence.split()) <= 16
        ]
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
    source=SOURCE + "political_data.csv",
    licence=LICENCE,
    made="A speech sentence and four words in a row of it or of another one, split by speech.",
    pair=True,
    pools=pools,
)

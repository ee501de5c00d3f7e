"""Same movie: are two review snippets about one film?

Two snippets of reviews of one film, or of two films; each snippet is used once. Split by movie.
Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

import itertools
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
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Pairs from two films (0) and from one film (1)."""
    usable = [t for t in movie_texts() if t.kind != "plot" and 6 <= len(t.text.split()) <= 24]
    rows = []
    for split, texts in grouped_by_split(usable).items():
        by_movie: dict[str, list[str]] = {}
        for text in texts:
            by_movie.setdefault(text.group, []).append(text.text)
        rng = draw("same_movie", split)
        apart: list[tuple[str, str, str]] = []
        for movie, own in by_movie.items():
            rng.shuffle(own)
            for number, (one, other) in enumerate(zip(own[::2], own[1::2], strict=False)):
                if number % 2:
                    apart.append((movie, one, other))
                else:
                    rows.append((movie, Row(one, other, 1)))
        rng.shuffle(apart)
        for (movie, one, _), (other_movie, _, other) in itertools.pairwise(apart):
            if movie != other_movie:
                rows.append((movie, Row(one, other, 0)))
    return balanced(by_split(rows), "same_movie")


TASK = Task(
    name="same_movie",
    title="Same movie",
    kind="classification",
    labels=("different", "same"),
    metric="f1",
    source=SOURCE + "rotten_tomatoes_corpus_full.csv.bz2",
    licence=LICENCE,
    made="Pairs of review snippets about one film or two, each snippet used once, split by movie.",
    pair=True,
    pools=pools,
)

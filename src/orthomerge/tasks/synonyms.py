"""Synonyms: do two words stand in one category of a thesaurus?

Two terms of one of Roget's categories, or of two categories; each category is used a few times and
belongs to one split. Licence of the package that carries them: Apache-2.0.
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
    split_of,
    thesaurus,
)
from orthomerge.tasks.task import Row, Task


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Pairs of two categories (0) and of one (1)."""
    by_home: dict[str, list[tuple[str, str, str]]] = {}
    for category, terms in thesaurus().items():
        rng = draw("synonyms", category)
        drawn = rng.sample(terms, min(24, len(terms) // 2 * 2))
        pairs = [(category, a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
        by_home.setdefault(split_of(category), []).extend(pairs)
    rows = []
    for split, pairs in sorted(by_home.items()):
        draw("synonyms", split).shuffle(pairs)
        half = len(pairs) // 2
        rows += [(category, Row(a, b, 1)) for category, a, b in pairs[:half]]
        for (category, a, _), (other, _, b) in zip(pairs[half:], pairs[half + 1 :], strict=False):
            if category != other:
                rows.append((category, Row(a, b, 0)))
    return balanced(by_split(rows), "synonyms")


TASK = Task(
    name="synonyms",
    title="Same thesaurus category",
    kind="classification",
    labels=("different", "same"),
    metric="f1",
    source=SOURCE + "roget.csv.bz2",
    licence=LICENCE,
    made="Two terms of one category of Roget's thesaurus or of two, split by category.",
    pair=True,
    pools=pools,
)

"""Topic: to which of six categories of a thesaurus does a word belong?

Words and short phrases of six of Roget's categories that share none of them. Split by word, all
words of one first stem together. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from orthomerge.tasks.corpora import LICENCE, SOURCE, Pools, balanced, by_split, thesaurus
from orthomerge.tasks.task import Row, Task

CATEGORIES = (
    "FEAR FEARFULNESS",
    "KNOWLEDGE",
    "IMPAIRMENT",
    "EXCITEMENT",
    "FALSENESS",
    "UNIMPORTANCE",
)


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Terms of one to three words with their category."""
    terms = [thesaurus()[category] for category in CATEGORIES]
    often = Counter(term for own in terms for term in own)
    rows = [
        (f"stem {term[:5].lower()}", Row(term, None, label))
        for label, own in enumerate(terms)
        for term in own
        if often[term] == 1 and len(term.split()) <= 3
    ]
    return balanced(by_split(rows), "topic")


TASK = Task(
    name="topic",
    title="Thesaurus category",
    kind="classification",
    labels=tuple(category.split()[0].lower() for category in CATEGORIES),
    metric="accuracy",
    source=SOURCE + "roget.csv.bz2",
    licence=LICENCE,
    made="Words and phrases of six categories of Roget's thesaurus, split by their first letters.",
    pair=False,
    pools=pools,
)

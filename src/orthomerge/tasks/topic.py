"""Topic: to which of six categories of a thesaurus do three words belong?

Lists of three words or phrases of one of six of Roget's categories; words that two of the six share
are left out and each word is used once. Split by the words' first letters, so that forms of one
word stay together. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    SPLITS,
    Pools,
    balanced,
    draw,
    split_of,
    thesaurus,
)
from orthomerge.tasks.task import Row, Task

CATEGORIES = {
    "fear": "FEAR FEARFULNESS",
    "knowledge": "KNOWLEDGE",
    "impairment": "IMPAIRMENT",
    "clothing": "CLOTHING",
    "excitement": "EXCITEMENT",
    "insanity": "INSANITY MANIA",
}
TERMS = 3


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Lists of three terms of one or two words with their category."""
    terms = [thesaurus()[category] for category in CATEGORIES.values()]
    often = Counter(term.lower() for own in terms for term in own)
    found: Pools = {split: [] for split in SPLITS}
    for label, own in enumerate(terms):
        usable = [t for t in own if often[t.lower()] == 1 and len(t.split()) <= 2]
        draw("topic", str(label)).shuffle(usable)
        for split, rows in found.items():
            here = [t for t in usable if split_of(f"stem {t[:5].lower()}") == split]
            for i in range(0, len(here) - TERMS + 1, TERMS):
                rows.append(Row(", ".join(here[i : i + TERMS]), None, label))
    return balanced(found, "topic")


TASK = Task(
    name="topic",
    title="Thesaurus category",
    kind="classification",
    labels=tuple(CATEGORIES),
    metric="accuracy",
    source=SOURCE + "roget.csv.bz2",
    licence=LICENCE,
    made="Three terms of one of six categories of Roget's thesaurus, split by first letters.",
    pair=False,
    pools=pools,
)

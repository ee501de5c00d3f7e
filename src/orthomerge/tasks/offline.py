"""Eight tasks that need no model hub, made of the texts of one packaged wheel (see `corpora`).

Every split is by source (movie, speech, statement, day, first letters of a word), so that nothing
leaks from training into the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from orthomerge.tasks.corpora import (
    LICENCE,
    SOURCE,
    SPLITS,
    Pools,
    balanced,
    by_split,
    convention_speeches,
    debate_statements,
    draw,
    grouped_by_split,
    headlines,
    movie_texts,
    sentences,
    split_of,
    thesaurus,
    word_ratings,
)
from orthomerge.tasks.task import Metric, Row, Task

_FILMS, _SPEECHES = "rotten_tomatoes_corpus_full.csv.bz2", "political_data.csv"
ROLES = ("Democratic", "Republican", "Moderator")
VERDICTS = ("rotten", "fresh")
CATEGORIES = {
    "fear": "FEAR FEARFULNESS",
    "knowledge": "KNOWLEDGE",
    "impairment": "IMPAIRMENT",
    "clothing": "CLOTHING",
    "excitement": "EXCITEMENT",
    "insanity": "INSANITY MANIA",
}
TERMS = 3
WORDS = 4


def offline(
    title: str,
    file: str,
    made: str,
    labels: tuple[str, ...] = (),
    metric: Metric = "accuracy",
    *,
    pair: bool = False,
) -> Callable[[Callable[[], Pools]], Task]:
    """A function that makes rows becomes the task of its name; without labels, a regression.

    Of a classification every split has as many rows of each class.
    """

    def made_of(rows: Callable[[], Pools]) -> Task:
        name = rows.__name__

        @lru_cache(maxsize=1)
        def pools() -> Pools:
            return balanced(rows(), name) if labels else rows()

        return Task(
            name=name,
            title=title,
            kind="classification" if labels else "regression",
            labels=labels,
            metric=metric,
            source=SOURCE + file,
            licence=LICENCE,
            made=made,
            pair=pair,
            pools=pools,
        )

    return made_of


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


@offline(
    "Words in order",
    _FILMS,
    "Plot sentences, the inner words of every second one shuffled, split by movie.",
    ("shuffled", "intact"),
    "matthews",
)
def acceptability() -> Pools:
    """Plot sentences of 6 to 16 words, each used once: shuffled (0) or as they are (1)."""
    rows: list[tuple[str, Row]] = []
    for item in movie_texts():
        for sentence in sentences(item.text, 6, 16) if item.kind == "plot" else ():
            intact = draw("acceptability", "intact", sentence).random() < 0.5
            text = sentence if intact else shuffled(sentence)
            rows.append((item.group, Row(text, None, int(intact))))
    return by_split(rows)


@offline(
    "Excerpt of a sentence",
    _SPEECHES,
    "A speech sentence and four words in a row of it or of another one, split by speech.",
    ("elsewhere", "inside"),
    "f1",
    pair=True,
)
def excerpt() -> Pools:
    """Sentences of 8 to 16 words with neighbouring words of another (0) or of their own (1)."""
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
            taken = " ".join(words[start : start + WORDS])
            rows.append((group, Row(sentence, taken, int(inside or taken in sentence))))
    return by_split(rows)


@offline(
    "Pleasantness of a word",
    "whissells_df.csv",
    "Words with the mean of people's ratings, split by the words' first letters.",
    metric="pearson_spearman",
)
def pleasantness() -> Pools:
    """Words of Whissell's dictionary with their rating less 2: from -1 (unpleasant) to 1."""
    return by_split(
        (f"stem {word[:5].lower()}", Row(word, None, round(rating - 2, 4)))
        for word, rating in word_ratings()
    )


@offline(
    "Debate role",
    "presidential_debates_2016.csv.gz",
    "Sentences of presidential debates with the speaker's role, split by statement.",
    ROLES,
)
def role() -> Pools:
    """Sentences of the debates of 2016 with the speaker's role; every speaker is in every split."""
    return by_split(
        (turn.group, Row(sentence, None, ROLES.index(turn.party)))
        for turn in debate_statements()
        for sentence in turn.sentences
    )


@offline(
    "Review sentiment",
    _FILMS,
    "Review snippets with the review's verdict, fresh or rotten, split by movie.",
    VERDICTS,
)
def sentiment() -> Pools:
    """Snippets of 4 to 40 words from rotten (0) and fresh (1) reviews."""
    return by_split(
        (item.group, Row(item.text, None, VERDICTS.index(item.kind)))
        for item in movie_texts()
        if item.kind in VERDICTS and 4 <= len(item.text.split()) <= 40
    )


@offline(
    "Share of words kept",
    "guardian_headlines.csv.bz2",
    "A headline and a copy with a drawn share of its words replaced, split by day.",
    metric="pearson_spearman",
    pair=True,
)
def similarity() -> Pools:
    """Headlines of 6 to 12 words with copies in which words of other headlines stand.

    The value is the share of words kept less the share replaced, from -1 to 1: a head that starts
    near 0 fits it without a long way to the mean.
    """
    usable = [item for item in headlines() if 6 <= len(item.text.split()) <= 12]
    rows: list[tuple[str, Row]] = []
    for own in grouped_by_split(usable).values():
        words = [word for item in own for word in item.text.split()]
        for item in own:
            rng = draw("similarity", item.text)
            copy = item.text.split()
            changed = rng.randint(0, len(copy))
            for i in rng.sample(range(len(copy)), changed):
                copy[i] = rng.choice(words)
            value = round(1 - 2 * changed / len(copy), 4)
            rows.append((item.group, Row(item.text, " ".join(copy), value)))
    return by_split(rows)


@offline(
    "Plot or review",
    _FILMS,
    "Sentences of plot summaries against sentences of reviews, split by movie.",
    ("plot", "review"),
)
def subjectivity() -> Pools:
    """Plot sentences (0) and review sentences (1)."""
    return by_split(
        (item.group, Row(sentence, None, int(item.kind != "plot")))
        for item in movie_texts()
        for sentence in sentences(item.text)
    )


@offline(
    "Thesaurus category",
    "roget.csv.bz2",
    "Three terms of one of six categories of Roget's thesaurus, split by first letters.",
    tuple(CATEGORIES),
)
def topic() -> Pools:
    """Lists of three terms with their category; terms that two categories share are left out."""
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
    return found


TASKS = (
    acceptability,
    excerpt,
    pleasantness,
    role,
    sentiment,
    similarity,
    subjectivity,
    topic,
)

"""Role: who says a sentence in a debate, a Democrat, a Republican or the moderator?

Sentences of the United States presidential debates of 2016. Split by statement, a speaker's turn;
the seven speakers are in every split. Licence of the package that carries them: Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

from orthomerge.tasks.corpora import LICENCE, SOURCE, Pools, balanced, by_split, debate_statements
from orthomerge.tasks.task import Row, Task

ROLES = ("Democratic", "Republican", "Moderator")


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Debate sentences with the speaker's role."""
    rows = [
        (turn.group, Row(sentence, None, ROLES.index(turn.party)))
        for turn in debate_statements()
        for sentence in turn.sentences
    ]
    return balanced(by_split(rows), "role")


TASK = Task(
    name="role",
    title="Debate role",
    kind="classification",
    labels=ROLES,
    metric="accuracy",
    source=SOURCE + "presidential_debates_2016.csv.gz",
    licence=LICENCE,
    made="Sentences of presidential debates with the speaker's role, split by statement.",
    pair=False,
    pools=pools,
)

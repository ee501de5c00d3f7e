"""Spans of time as a person reads them."""

from __future__ import annotations

import pytest

from orthomerge.io.units import human_duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (1.8e-3, "under 1 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (599.4, "9 min 59 s"), (599.6, "10 min"), (3569, "59 min"), (3571, "1 h 00 min"),
        (86369, "23 h 59 min"), (86371, "1 d 00 h"), (277200, "3 d 05 h"),
    ],
)  # fmt: skip
def test_a_span_has_its_two_largest_units_and_never_sixty_of_one(seconds, words):
    assert human_duration(seconds) == words

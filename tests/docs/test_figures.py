"""Pictures of the documents are those of the code and the kept numbers."""

from __future__ import annotations

import json

import pytest
from blocks import ROOT

FIGURES = ROOT / "docs" / "figures"


def test_the_picture_of_the_architecture_is_that_of_the_imports(monkeypatch):
    pytest.importorskip("grimp")
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.figures.architecture import PICTURE, picture

    again = "run: python docs/figures/architecture.py"
    assert PICTURE.read_text(encoding="utf-8") == picture(), again


def test_the_readmes_picture_is_drawn_from_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.figures.offline8 import PICTURE, found
    from orthomerge.io.files import fingerprint

    again = "run: python -m docs.figures.offline8"
    assert fingerprint(found()) in PICTURE.read_text(encoding="utf-8"), again


def test_the_picture_of_the_penalty_is_drawn_from_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.figures.penalty import PICTURE, found
    from orthomerge.io.files import fingerprint

    again = "run: python -m docs.figures.penalty"
    assert fingerprint(found()) in PICTURE.read_text(encoding="utf-8"), again


def test_the_pictures_of_the_theory_are_drawn_from_the_kept_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.figures.theory import NUMBERS, fingerprint_of

    mark = fingerprint_of(json.loads(NUMBERS.read_text(encoding="utf-8")))
    for name in ("spectrum", "seen", "trap"):
        text = (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
        assert mark in text, "run: python -m docs.figures.theory"


def test_what_the_theory_says_of_the_pictures_is_so():
    found = json.loads((FIGURES / "theory.json").read_text(encoding="utf-8"))
    shares = found["shares"]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    most = next(i for i in range(384) if sum(shares[: i + 1]) >= 0.9) + 1
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert f"{most} of 384 directions hold 90 %" in page
    assert f"{100 * sum(shares[-8:]):.2f} %, where eight random ones hold 2 %" in page
    assert shares[-1] < 1e-5
    ratios = {
        title: sorted(own / other for other, own in points)[len(points) // 2]
        for title, points in found["seen"].items()
    }
    assert 0.5 < ratios["random rows"] < 2 and 0.5 < ratios["min_eigen (the paper)"] < 3
    assert ratios["contrastive"] > 3
    trap = {title: of["mean"] for title, of in found["trap"].items()}
    assert trap["last rows of a full SVD"] > 0.9
    assert max(v for t, v in trap.items() if t != "last rows of a full SVD") < 0.7


@pytest.mark.slow
def test_the_numbers_of_the_theory_come_out_again(monkeypatch):
    """The same tasks and base give the same shares, to what another machine may round."""
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.figures.theory import NUMBERS, measure

    kept, again = json.loads(NUMBERS.read_text(encoding="utf-8")), measure()
    assert again["layer"] == kept["layer"]
    assert again["shares"] == pytest.approx(kept["shares"], rel=0.02, abs=1e-8)
    for title in ("a seeded draw", "most own energy"):
        assert again["trap"][title]["mean"] == pytest.approx(kept["trap"][title]["mean"], abs=0.02)

"""The documentation site: built without a warning, complete, and silent towards other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import orthomerge

pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


class _Loads(HTMLParser):
    """What a browser fetches by itself when it opens a page: not the links a reader follows."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.urls.append(values["src"])
        if tag == "link" and values.get("rel") != "canonical" and values.get("href"):
            self.urls.append(values["href"])


def test_a_page_loads_nothing_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        parser = _Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.urls and not [u for u in parser.urls if re.match(r"(\w+:)?//", u)], page
    asked = re.compile(r"(url\(|@import)\s*['\"]?(https?:)?//")
    for style in site.rglob("*.css"):
        assert not asked.search(style.read_text(encoding="utf-8")), style


def test_every_page_of_the_repository_is_in_the_navigation(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in home, page


def test_every_verb_with_its_options_is_in_the_reference(site, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    from commands import verbs

    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    found = list(verbs())
    assert len(found) > 15
    for name, verb in found:
        assert f"orthomerge {name}" in text
        if not hasattr(verb, "commands"):
            assert all(p.opts[0] in text for p in verb.params if p.opts[0].startswith("--")), name


def test_every_public_name_has_its_docstring_in_the_reference(site):
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in orthomerge.__all__:
        assert f'id="orthomerge.{name}"' in text, name
    for home, names in orthomerge.PACKAGES.items():
        for name in names:
            assert f'id="orthomerge.{home}.{name}"' in text, name

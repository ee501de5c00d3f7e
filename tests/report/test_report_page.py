"""The page: whole, offline, rebuilt from rows alone, and safe whatever the rows say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fake_rows import ARMS, TASKS, fake_analyses, fake_rows, fake_run, row

from orthomerge.errors import OrthomergeError
from orthomerge.io.rows import append_rows
from orthomerge.report import build_comparison, build_report

VOID = {"meta", "link", "br", "input", "path", "circle", "img", "hr"}


class Page(HTMLParser):
    """Elements, text outside scripts, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


def build(folder, rows, run=None) -> tuple[str, Page]:
    append_rows(folder / "results.jsonl", rows)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    path = build_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


@pytest.fixture(scope="module", autouse=True)
def short_plotly():
    """Most tests read the page over and over: 5 MB of a library less each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthomerge.report.templates.get_plotlyjs", lambda: "/* plotly.js v0 */")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rows, folder = fake_rows(), tmp_path_factory.mktemp("run")
    fake_analyses(folder, rows)
    return build(folder, rows, fake_run(rows))


def test_every_arm_task_and_section_is_there(whole):
    _, page = whole
    for name in [*ARMS, *TASKS]:
        assert name in page.text
    for words in ("Scores by arm and merge", "Task by task", "learning rates were chosen"):
        assert words in page.text
    for words in ("CC-BY-4.0", "3f3f3f", "orthomerge run recipes/fake.yaml", "density: 0.2"):
        assert words in page.text
    assert "so far" not in page.text


def test_nothing_is_loaded_from_outside(whole):
    _, page = whole
    assert all("src" not in a for a in page.all("script"))
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))
    (policy,) = [a for a in page.all("meta") if a.get("http-equiv")]
    assert "default-src 'none'" in str(policy["content"])


def test_plotly_is_there_once(whole):
    text, page = whole
    assert text.count("/* plotly.js v0 */") == 1
    assert len([a for a in page.all("div") if "data-figure" in a]) == 5
    assert all(a["aria-label"] for a in page.all("div") if "data-figure" in a)


def test_tables_have_captions_and_scopes(whole):
    _, page = whole
    assert len(page.all("caption")) == len(page.all("table")) == 7
    assert all(a.get("scope") for a in page.all("th"))


def test_every_table_sorts_and_copies(whole):
    _, page = whole
    tables = {a["id"]: a["class"] for a in page.all("table")}
    assert set(tables.values()) == {"sortable"}
    copied = {a["data-copy"] for a in page.all("button") if a.get("class") == "copy"}
    named = {"tasks" if t == "by-task" else t for t in tables}  # in long form, under its own name
    assert copied == named


def test_ids_are_unique_and_links_lead_somewhere(whole):
    _, page = whole
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)


def test_rows_alone_are_enough(tmp_path):
    _, page = build(tmp_path, fake_rows(ARMS[:3], TASKS[:2]))
    assert "from the rows alone" in page.text
    assert "osrm" in page.text


@pytest.mark.parametrize("content", ["{", "[]", '{"tasks": 3, "base": [], "seconds": "x"}'])
def test_a_broken_record_does_not_stop_the_page(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    _, page = build(tmp_path, fake_rows(ARMS[:2], TASKS[:2]))
    assert "osrm" in page.text or "default" in page.text


def test_an_unfinished_run_says_so(tmp_path):
    rows = fake_rows(ARMS[:2], TASKS[:3], rates=[0.002])
    _, page = build(tmp_path, rows[:-4], fake_run(rows))
    assert f"{len(rows) - 4} of {len(rows)} rows so far" in page.text
    assert "2 of 3 tasks so far" in page.text


@pytest.mark.parametrize(
    "rows",
    [
        [row("a", "x", 0.5)],
        [row("a", "x", 0.5, split="selection")],
        [row("a", "x", 0.5, method="ties", weight=1.0)],
        [row("a", "x", 0.5, method="ties", weight=None)],
        [row("a", "x", 0.5, majority=None)],
        [row("a", "x", float("nan"))],
        fake_rows(ARMS[:3], TASKS[:2], merges=[]),
        fake_rows(ARMS[:2], TASKS[:2], seeds=range(7)),
    ],
)
def test_odd_runs_still_give_a_page(tmp_path, rows):
    build(tmp_path, rows)


def test_hostile_strings_are_only_text(tmp_path):
    evil = "</script><script>alert(1)</script>"
    image = '"><img src=x onerror=alert(1)>'
    rows = fake_rows([evil, f"`{image}`"], [image, "t&amp;"], merges=[("task_arithmetic", 1.0, {})])
    rows += [
        row(t, evil, 0.5, method=image, weight=1.0, options={evil: evil}, start=evil)
        for t in (image, "t&amp;")
    ]
    run = fake_run(rows) | {
        "command": evil,
        "recipe": "</code></pre>" + evil,
        "name": evil,
        "base": {"id": image},
        "versions": {evil: image},
    }
    text, page = build(tmp_path, rows, run)
    assert page.all("img") == []
    plain = build(tmp_path / "plain", fake_rows(["x", "y"], ["a", "b"]))[1]
    assert len(page.all("script")) == len(plain.all("script"))
    assert evil in page.text
    assert "t&amp;" in page.text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(data)["name"] == evil


def test_missing_or_empty_rows_are_named(tmp_path):
    with pytest.raises(OrthomergeError, match=r"no result rows at .*results\.jsonl"):
        build_report(tmp_path)
    (tmp_path / "results.jsonl").write_text("\n")
    with pytest.raises(OrthomergeError, match="holds no row"):
        build_report(tmp_path)


def test_building_again_replaces_the_page(tmp_path):
    build(tmp_path, [row("a", "first", 0.5)])
    _, page = build(tmp_path, [row("a", "second", 0.5)])
    assert "second" in page.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.jsonl"]


def test_two_runs_side_by_side(tmp_path):
    for name, arms in (("before", ARMS[:3]), ("after", ARMS[1:4])):
        rows = fake_rows(arms, TASKS[:3])
        (tmp_path / name).mkdir()
        fake_analyses(tmp_path / name, rows)
        build(tmp_path / name, rows, fake_run(rows) | {"name": name})
    path = build_comparison([tmp_path / "before", tmp_path / "after"])
    assert path == tmp_path / "compare-before-after.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for words in ("before: default", "after: osrm-frozen", "after minus before", "What differs"):
        assert words in page.text
    assert "before: osrm-frozen" not in page.text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_comparison_needs_runs_that_share_a_task(tmp_path):
    for name, task in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        append_rows(tmp_path / name / "results.jsonl", [row(task, "d", 0.5)])
    with pytest.raises(OrthomergeError, match="share no task"):
        build_comparison([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(OrthomergeError, match="needs two"):
        build_comparison([tmp_path / "a"])


def test_the_difference_is_the_second_less_the_first(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.625)):
        (tmp_path / name).mkdir()
        append_rows(tmp_path / name / "results.jsonl", [row("x", "d", value), row("y", "d", value)])
    page = Page(build_comparison([tmp_path / "a", tmp_path / "b"]).read_text(encoding="utf-8"))
    cells = [a for a in page.all("td") if a.get("data-value") == "0.125"]
    assert len(cells) == 1
    assert "+12.5" in page.text


def test_many_merges_are_a_line_each(tmp_path):
    merges = [("task_arithmetic", w / 10, {}) for w in range(1, 18)]
    _, page = build(tmp_path, fake_rows(ARMS[:2], TASKS[:2], merges=merges))
    heads = [a["data-value"] for a in page.all("th") if a.get("data-value")]
    assert heads[:3] == ["alone", "sum × 0.1", "sum × 0.2"]
    assert "the row's best" in page.text
    assert "default-unit, init" in page.text


def text_rows(arm: str = "default"):
    rows = fake_rows([arm], TASKS[:4], rates=[0.002])
    return [
        replace(r, form="text", scoring="generation" if r.task == "stsb" else "likelihood")
        for r in rows
    ]


def test_how_tasks_are_answered_is_said(tmp_path):
    (tmp_path / "text").mkdir()
    _, page = build(tmp_path / "text", text_rows())
    assert "as text, scored by likelihood (cola, sst2, mrpc)" in page.text
    assert "as text, scored by generation (stsb)" in page.text
    (tmp_path / "heads").mkdir()
    _, page = build(tmp_path / "heads", fake_rows(["default"], TASKS[:4], rates=[0.002]))
    assert "by heads of labels" in page.text
    path = build_comparison([tmp_path / "heads", tmp_path / "text"])
    page = Page(path.read_text(encoding="utf-8"))
    assert "do not answer their tasks alike (heads: by heads of labels; text: as text" in page.text


def test_a_comparison_is_headed_by_the_best_of_each_run(tmp_path):
    for name, gain in (("before", 0.0), ("after", 0.1)):
        (tmp_path / name).mkdir()
        rows = [
            row("x", arm, value + gain * (method != "single"), method=method, weight=weight)
            for arm, value in (("default", 0.5), ("other", 0.6))
            for method, weight in (("single", None), ("task_arithmetic", 1.0))
        ]
        append_rows(tmp_path / name / "results.jsonl", rows)
    path = build_comparison([tmp_path / "before", tmp_path / "after"])
    text = Page(path.read_text(encoding="utf-8")).text
    assert "single-task score with after: other, 100.0 % with before: other" in text


def test_a_difference_that_rounds_to_nothing_has_no_sign(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.4999)):
        (tmp_path / name).mkdir()
        append_rows(tmp_path / name / "results.jsonl", [row("x", "d", value)])
    page = Page(build_comparison([tmp_path / "a", tmp_path / "b"]).read_text(encoding="utf-8"))
    assert "-0.0" not in page.text and "+0.0" not in page.text

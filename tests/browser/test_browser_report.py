"""The page in a real Chromium: it draws, moves, sorts, copies, and can be read by everybody."""

from __future__ import annotations

import csv
import io

import pytest
from browser.chromium import serious


@pytest.fixture
def address(run_folder):
    return (run_folder / "report.html").as_uri()


def colours(page, place: str):
    return page.evaluate(f"document.querySelector('[data-figure={place}]').data[0].z")


def test_every_figure_is_drawn_without_a_word_in_the_console(open_page, address):
    page = open_page(address)
    figures = page.locator("[data-figure]")
    assert figures.count() == 5
    assert page.locator("[data-figure] svg.main-svg").count() >= 5
    assert all(f.get_attribute("aria-label") for f in figures.all())
    page.click("#theme")
    assert page.said == []


def test_the_slider_changes_the_heat_map(open_page, address):
    page = open_page(address)
    slider = page.locator("[data-controls=interference] input")
    before, name = (
        colours(page, "interference"),
        page.locator("[data-controls=interference] output"),
    )
    assert name.text_content() == "all layers"
    slider.focus()
    page.keyboard.press("ArrowRight")
    after = colours(page, "interference")
    assert after != before
    assert name.text_content() == slider.get_attribute("aria-valuetext") == "0.self.query"
    page.keyboard.press("ArrowLeft")
    assert colours(page, "interference") == before
    page.locator("[data-controls=interference] select").select_option(label="osrm")
    assert colours(page, "interference") != before
    assert page.said == []


def test_choosing_a_task_changes_spectra_and_curves(open_page, address):
    page = open_page(address)
    for place in ("spectra", "curves"):
        get = f"document.querySelector('[data-figure={place}]').data.at(-1).y"
        before = page.evaluate(get)
        page.locator(f"[data-controls={place}] select").select_option(label="stsb")
        assert page.evaluate(get) != before
    assert page.said == []


def test_sorting_sorts_and_says_so(open_page, address):
    page = open_page(address)
    head = page.locator("#headline thead tr:nth-child(2) th").nth(0)
    values = (
        "[...document.querySelectorAll('#headline tbody tr')].map(r => +r.cells[1].dataset.value)"
    )
    assert head.get_attribute("aria-sort") is None
    head.locator("button").focus()
    page.keyboard.press("Enter")
    found = page.evaluate(values)
    assert head.get_attribute("aria-sort") == "descending"
    assert found == sorted(found, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.evaluate(values) == sorted(found)


def test_tables_are_copied_as_csv(open_page, address):
    page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
    for button in page.locator("button.copy:visible").all():
        what = button.get_attribute("data-copy")
        button.click()
        page.wait_for_function("document.getElementById('said').textContent === 'Copied'")
        text = page.evaluate("navigator.clipboard.readText()")
        head, *lines = csv.reader(io.StringIO(text))
        assert len(lines) >= 3, what
        assert {len(line) for line in lines} == {len(head)}, what
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, address, axe, scheme):
    page = open_page(address, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert serious(page, axe) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_does_not_scroll_sideways(open_page, address, scheme):
    page = open_page(address, scheme=scheme, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.said == []


def test_printing_gives_whole_pages_in_light_colours(open_page, address):
    page = open_page(address, scheme="dark")
    assert page.pdf()[:5] == b"%PDF-"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 32, 38)"
    assert not page.locator("nav").is_visible()


@pytest.fixture
def large(tmp_path_factory):
    """A page with more of everything than a sheet or a phone is wide."""
    from fake_rows import ARMS, MERGES, fake_analyses, fake_rows

    from orthomerge.io.rows import append_rows
    from orthomerge.report import build_report

    folder = tmp_path_factory.mktemp("large")
    tasks = [f"a-rather-long-name-{i}" for i in range(9)]
    rows = fake_rows(ARMS, tasks, merges=[*MERGES, ("emr", 1.0, {}), ("fisher", 1.0, {})])
    append_rows(folder / "results.jsonl", rows)
    fake_analyses(folder, rows)
    return build_report(folder).as_uri()


WIDTHS = """[...document.querySelectorAll("%s")].filter((e) => e.getBoundingClientRect().width)
    .map((e) => [e.id || e.className || e.dataset.figure, e.getBoundingClientRect().right])"""


def test_nothing_is_wider_or_higher_than_the_sheet(open_page, large):
    page = open_page(large, scheme="dark")
    heads = page.locator("#headline thead tr:last-child th").all_text_contents()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    sheet = page.evaluate("document.body.getBoundingClientRect().right")
    assert sheet == 1031  # A4 landscape less its margins, at 96 dots an inch
    for what in (".box > table", "[data-figure]", "[data-figure] svg.main-svg"):
        found = page.evaluate(WIDTHS % what)
        assert found
        assert [name for name, right in found if right > sheet + 1] == []
    heights = page.evaluate(
        "[...document.querySelectorAll('[data-figure]')].map((e) => e.offsetHeight)"
    )
    assert max(heights) <= 560
    parts = page.locator("#headline ~ .part thead tr:last-child th")
    assert [h for h in parts.all_text_contents() if h in heads] == heads
    assert not page.locator("#headline").is_visible()
    assert page.locator("[data-controls=interference] select").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.locator(".part").count() == 0
    assert page.locator("#headline").is_visible()
    assert page.said == []


def test_figures_are_printed_in_light_colours_and_are_dark_again_after(open_page, address):
    page = open_page(address, scheme="dark")
    paper = "document.querySelector('[data-figure=weight]')._fullLayout.paper_bgcolor"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(paper) == "#ffffff"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(paper) == "#181d23"


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_are_whole_and_clear_of_the_legend(open_page, large, width):
    page = open_page(large, width=width)
    cut = page.evaluate("""[...document.querySelectorAll("[data-figure]")].flatMap((box) => {
        const frame = box.getBoundingClientRect(), of = (s) => [...box.querySelectorAll(s)];
        const titles = of(".g-xtitle text, .g-x2title text").filter((t) => {
            const r = t.getBoundingClientRect();
            return r.left < frame.left - 1 || r.right > frame.right + 1;
        });
        const legend = of(".legend")[0]?.getBoundingClientRect().top ?? Infinity;
        const labels = of(".xtick text, .g-xtitle text, .x2tick text, .g-x2title text");
        const over = labels.filter((t) => t.getBoundingClientRect().bottom > legend + 1);
        return [...titles, ...over].map((t) => `${box.dataset.figure}: ${t.textContent}`);
    })""")
    assert cut == []

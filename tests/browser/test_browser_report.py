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

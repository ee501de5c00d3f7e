"""The board in a real Chromium, against a real server."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from browser.chromium import serious

from orthomerge.io.rows import append_rows, read_rows

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")


@pytest.fixture(scope="module")
def board(run_folder):
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'board'")
    from orthomerge.board import make_app

    other = run_folder.parent / "other"
    append_rows(other / "results.jsonl", read_rows(run_folder / "results.jsonl")[:-40])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(run_folder.parent), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_runs_are_listed_followed_opened_and_compared(open_page, board, run_folder, axe, scheme):
    page = open_page(board, scheme=scheme)
    page.wait_for_selector("#runs tr:nth-child(2)")
    assert page.locator("#runs th").all_text_contents() == ["other", "fake"]
    assert page.locator("#compare").is_disabled()
    assert serious(page, axe) == []

    rows = read_rows(run_folder / "results.jsonl")
    shown = page.locator("#runs tr:first-child td").nth(1)
    before = shown.text_content()
    have = len(read_rows(run_folder.parent / "other" / "results.jsonl"))
    append_rows(run_folder.parent / "other" / "results.jsonl", rows[have : have + 1])
    playwright.expect(shown).not_to_have_text(before)

    for box in page.locator("#runs input").all():
        box.check()
    page.click("#compare")
    page.wait_for_selector("#differences")
    page.go_back()
    page.wait_for_selector("#runs tr")
    page.click("#runs a >> nth=1")
    page.wait_for_selector("[data-figure] svg.main-svg")
    assert page.said == []


def test_a_phone_does_not_scroll_sideways(open_page, board):
    page = open_page(board, width=390)
    page.wait_for_selector("#runs tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_run_of_many_arms_is_no_taller_than_the_others(open_page, board, run_folder):
    from fake_rows import ARMS, TASKS, fake_rows

    append_rows(run_folder.parent / "many" / "results.jsonl", fake_rows(ARMS, TASKS[:1], [0]))
    page = open_page(board, width=390)
    cell = page.locator("#runs tr", has_text="many").locator("td.arms")
    assert cell.text_content() == f"{', '.join(ARMS[:4])} and {len(ARMS) - 4} more"
    assert cell.get_attribute("title") == ", ".join(ARMS)

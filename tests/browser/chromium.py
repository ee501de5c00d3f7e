"""A real headless Chromium, where there is one, and the page of a made-up run with everything."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))

AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium on the path")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Opens an address in a fresh window; what its console says is kept in `page.said`."""
    contexts = []

    def opened(address: str, *, scheme: str = "light", width: int = 1280, **more):
        size = {"width": width, "height": 900}
        context = browser.new_context(color_scheme=scheme, viewport=size, **more)
        contexts.append(context)
        page = context.new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda problem: page.said.append(str(problem)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    from fake_rows import ARMS, TASKS, fake_analyses, fake_rows, fake_run

    from orthomerge.io.rows import append_rows
    from orthomerge.report import build_report

    folder = tmp_path_factory.mktemp("browser") / "fake"
    folder.mkdir()
    rows = fake_rows(ARMS[:3], TASKS[:4])
    append_rows(folder / "results.jsonl", rows)
    fake_analyses(folder, rows)
    (folder / "run.json").write_text(json.dumps(fake_run(rows)), encoding="utf-8")
    build_report(folder)
    return folder


@pytest.fixture(scope="session")
def axe() -> str:
    """The text of axe-core; `make axe` fetches it."""
    if not AXE.is_file():
        pytest.skip("needs axe-core: run 'make axe'")
    return AXE.read_text(encoding="utf-8")


def serious(page, axe: str) -> list[str]:
    """What axe-core finds serious or critical, each with the first element it is said of."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]

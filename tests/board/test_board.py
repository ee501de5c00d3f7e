"""The board lists runs, opens reports, and lets nobody out of its folder or in from elsewhere."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from conftest import call
from typer.testing import CliRunner

from orthomerge.cli import app as cli
from orthomerge.errors import OrthomergeError
from orthomerge.io.rows import append_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))
from fake_rows import ARMS, TASKS, fake_rows, fake_run

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra 'board'")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    import json

    base = tmp_path_factory.mktemp("board")
    for folder, arms in (("runs/one", ARMS[:2]), ("runs/deep/two", ARMS[:2]), ("secret", ARMS[:1])):
        rows = fake_rows(arms, TASKS[:2], seeds=[0])
        append_rows(base / folder / "results.jsonl", rows[:-3])
        record = json.dumps(fake_run(rows) | {"name": folder})
        (base / folder / "run.json").write_text(record, encoding="utf-8")
    (base / "runs" / "out").symlink_to(base / "secret", target_is_directory=True)
    (base / "runs" / "linked").mkdir()
    (base / "runs" / "linked" / "results.jsonl").symlink_to(base / "secret" / "results.jsonl")
    return base / "runs"


@pytest.fixture(scope="module")
def client(root):
    from orthomerge.board import make_app

    return testclient.TestClient(make_app(root), base_url="http://127.0.0.1:8765")


def test_every_run_of_the_folder_is_listed_and_no_other(client):
    found = client.get("/runs.json").json()
    assert found["folder"] == "runs"
    runs = {run["id"]: run for run in found["runs"]}
    assert set(runs) == {"one", "deep/two"}
    one = runs["one"]
    assert one["arms"] == ARMS[:2]
    assert one["expected"] - one["rows"] == 3
    assert "default" in one["best"]


def test_a_report_is_made_from_the_rows_as_they_are(client, root):
    before = client.get("/report", params={"run": "one"})
    assert before.status_code == 200
    assert "not finished" in before.text
    assert before.headers["content-security-policy"].startswith("default-src 'none'")
    assert not (root / "one" / "report.html").exists()


def test_chosen_runs_are_compared(client):
    page = client.get("/report", params={"run": ["one", "deep/two"]}).text
    assert "What differs" in page


OUTSIDE = [
    "../secret", "..", ".", "", "/etc", "one/../../secret", "%2e%2e/secret", "..%2fsecret", "out",
    "linked", "one/..", "deep/../../secret", "..\\secret", "one\0", "//one",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folder_is_read(client, root, name):
    for wanted in (name, str(root.parent / "secret")):
        answer = client.get("/report", params={"run": wanted})
        assert answer.status_code == 404
        assert "unknown run" in answer.text


@pytest.mark.parametrize(
    "path", ["/../secret/run.json", "/%2e%2e/secret/run.json", "/one/results.jsonl", "/etc/passwd"]
)
def test_files_are_not_served(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/", "/runs.json", "/report?run=one"])
def test_it_is_read_only(client, method, path):
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7:8765", ""])
def test_another_host_is_refused(client, host):
    assert client.get("/runs.json", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1:8765"])
def test_this_machine_is_not_refused(client, host):
    assert client.get("/runs.json", headers={"host": host}).status_code == 200


def test_a_report_of_nothing_is_an_error_in_a_sentence(client):
    assert client.get("/report").status_code == 400


def test_rows_that_cannot_be_read_do_not_hide_the_others(tmp_path):
    from orthomerge.board import make_app

    append_rows(tmp_path / "good" / "results.jsonl", fake_rows(ARMS[:1], TASKS[:1], seeds=[0]))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.jsonl").write_text("no row\n{}\n{}\n", encoding="utf-8")
    client = testclient.TestClient(make_app(tmp_path), base_url="http://localhost")
    runs = {r["id"]: r for r in client.get("/runs.json").json()["runs"]}
    assert "is not a result row" in runs["bad"]["problem"]
    assert runs["good"]["problem"] == ""


def test_a_taken_port_is_named(root):
    from orthomerge.board import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OrthomergeError, match=f"port {port} is taken"):
            serve(root, port)


def test_a_missing_folder_or_extra_is_named(root, monkeypatch, tmp_path):
    from orthomerge.board import make_app

    with pytest.raises(OrthomergeError, match="no folder"):
        make_app(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(OrthomergeError, match=r"pip install 'orthomerge\[board\]'"):
        make_app(root)
    result = CliRunner().invoke(cli, ["board", str(root)])
    assert isinstance(result.exception, OrthomergeError)
    assert "http" not in result.output  # no address is promised that nobody serves


def test_help_says_what_it_does():
    assert "local page" in call("report", "--help")

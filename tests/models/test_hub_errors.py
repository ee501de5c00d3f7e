"""What goes wrong at the hub, by the real exceptions of its clients, is one sentence each."""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, AssetError
from orthomerge.models.assets import resolve_model
from orthomerge.models.hub import hub_reason
from orthomerge.tasks import get_task, glue

ANSWERS = {
    "gated": (
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
        ["is gated", "accept its terms", "hf auth login", "a folder with a copy"],
    ),
    "missing": (
        (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
        ["has no such model", "check the name", "hf auth login"],
    ),
    "silent": (None, ["does not answer", "try again", "a folder with a copy"]),
}


@contextmanager
def hub_that_answers(status, headers):
    """A server on this machine that gives every request one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_real_client_on_a_hub_that_says_no(kind, monkeypatch, tmp_path):
    answer, words = ANSWERS[kind]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with hub_that_answers(*(answer or (200, {}))) as address:
        # Nobody listens at port 9.
        monkeypatch.setattr(constants, "ENDPOINT", address if answer else "http://127.0.0.1:9")
        with pytest.raises(AssetError) as caught:
            resolve_model("meta-llama/Llama-3.2-1B")
    says(caught, ["no model 'meta-llama/Llama-3.2-1B'", *words])


CASES = {
    "silent": (
        errors.LocalEntryNotFoundError("cannot find the snapshot\non the disk"),
        ["does not answer", "try again", "a folder with a copy"],
    ),
    "unreachable": (ConnectionError("couldn't reach it"), ["does not answer"]),
    "full": (
        OSError(errno.ENOSPC, "No space left on device"),
        ["no room left on the disk", "HF_HOME"],
    ),
    "else": (ValueError("odd.\nand more"), ["the hub said: odd"]),
}


@pytest.fixture(params=CASES, ids=str)
def trouble(request, monkeypatch):
    problem, words = CASES[request.param]

    def fail(*_args, **_options):
        raise problem

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    glue.pools.cache_clear()
    yield words
    glue.pools.cache_clear()


def says(caught, words):
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message and message.endswith(".") and ".." not in message


def test_a_model_that_does_not_come(trouble):
    with pytest.raises(AssetError) as caught:
        resolve_model("org/name")
    says(caught, ["no model 'org/name'", *trouble])


def test_an_adapter_that_does_not_come(trouble):
    with pytest.raises(AdapterError) as caught:
        read_adapter("org/name")
    says(caught, ["no adapter 'org/name'", *trouble])


def test_data_that_do_not_come(trouble, monkeypatch):
    monkeypatch.delenv(glue.FOLDER_VARIABLE, raising=False)
    with pytest.raises(AssetError) as caught:
        get_task("glue/cola").data(train=1)
    says(caught, ["no data for 'glue/cola'", glue.FOLDER_VARIABLE, *trouble])


def test_offline_mode_is_told_from_a_hub_that_is_silent(monkeypatch, tmp_path):
    """The real client, told not to ask."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        resolve_model("meta-llama/Llama-3.2-1B")
    says(caught, ["no model 'meta-llama/Llama-3.2-1B'", "HF_HUB_OFFLINE is set"])


def test_the_cause_behind_an_error_is_told():
    try:
        try:
            raise errors.OfflineModeIsEnabled("offline")
        except OSError as problem:
            raise RuntimeError("could not load it") from problem
    except RuntimeError as outer:
        assert "the hub" in hub_reason(outer) and "could not load" not in hub_reason(outer)

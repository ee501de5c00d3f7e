"""A hub on this machine: repositories made and filled over HTTP by the real client."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """What was made and committed; `url` is the endpoint while the block runs."""

    def __init__(self) -> None:
        self.repos: list[str] = []
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format, *args):
                """Nothing on standard error."""

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(outer.post(self.path, body))

            def do_GET(self):
                self.answer(outer.get(self.path))

            def answer(self, value):
                text = json.dumps(
                    value if value is not None else {"error": "no such page"}
                ).encode()
                self.send_response(404 if value is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # a port that is free now
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def get(self, path: str):
        found = re.match(r"/api/models/([^/]+/[^/?]+)", path)
        if found and found[1] in self.repos:
            files = [{"rfilename": name} for name in self.files]
            return {"id": found[1], "sha": "0" * 40, "siblings": files, "private": False}
        return None

    def post(self, path: str, body: bytes):
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.append(name)
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            # All in the commit itself: large files go to a store of their own on the real hub.
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.decode().strip().split("\n")):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            place = f"{self.url}/{self.repos[-1]}/commit/0"
            return {"commitUrl": place, "commitOid": "0" * 40, "commitMessage": ""}
        return None

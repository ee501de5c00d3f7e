"""The board's server: read-only, on this machine alone, and nothing outside its folder."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from orthomerge.board.runs import inside, list_runs
from orthomerge.errors import OrthomergeError, UnknownNameError
from orthomerge.report import render_report
from orthomerge.report.templates import fill

HOST = "127.0.0.1"
_NAMES = ["127.0.0.1", "localhost"]
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'self'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(folder: str | Path) -> Any:
    """The Starlette application over the runs below `folder`.

    `/` lists them, `/runs.json` the same for a page that follows, `/report?run=a` a run's page made
    from its rows as they are now, `/report?run=a&run=b` several on one page. Every route answers
    to GET alone; another Host than this machine's is refused, so that no page from elsewhere reads
    along (DNS rebinding).

    Raises:
        OrthomergeError: no such folder, or the extra 'board' is not installed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise OrthomergeError(f"no folder '{root}': name the folder that your runs lie in.")
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as problem:
        raise _missing() from problem

    def home(request: Request) -> Response:
        page = files("orthomerge.board").joinpath("board.html").read_text(encoding="utf-8")
        return HTMLResponse(fill(page), headers=_HEADERS)

    def runs(request: Request) -> Response:
        found = [run.to_dict() for run in list_runs(root)]
        return JSONResponse({"folder": root.resolve().name, "runs": found}, headers=_HEADERS)

    def report(request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        try:
            if not names:
                raise OrthomergeError("no run is named: choose one on the board.")
            page = render_report([inside(root, name) for name in names])
        except OrthomergeError as problem:
            status = 404 if isinstance(problem, UnknownNameError) else 400
            return PlainTextResponse(str(problem), status_code=status, headers=_HEADERS)
        return HTMLResponse(page, headers=_HEADERS)

    routes = [Route(path, answer, methods=["GET"]) for path, answer in (
        ("/", home), ("/runs.json", runs), ("/report", report),
    )]  # fmt: skip
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def serve(folder: str | Path, port: int, ready: Callable[[str], None] | None = None) -> None:
    """Serve the board until it is interrupted.

    Args:
        folder: what the runs lie in.
        port: the port on this machine.
        ready: is given the address as soon as the port is held.

    Raises:
        OrthomergeError: what `make_app` refuses, or the port is taken.
    """
    app = make_app(folder)
    try:
        import uvicorn
    except ImportError as problem:
        raise _missing() from problem
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as problem:
            raise OrthomergeError(
                f"port {port} is taken or not allowed: choose another --port."
            ) from problem
        if ready is not None:
            ready(f"http://{HOST}:{port}/")
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


def _missing() -> OrthomergeError:
    return OrthomergeError("the board needs an extra: pip install 'orthomerge[board]'.")

"""A hub on this machine: enough of its HTTP interface for commits, file lists and downloads. For tests only."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Repositories = dict[str, dict[str, bytes]]
"""``models/NAME`` or ``datasets/NAME`` → files at ``COMMIT``, which is ``main``."""


@contextmanager
def hub(repositories: Repositories, requests: list[str]) -> Iterator[str]:
    """Serve the repositories; ``requests`` gets a line for each request: method, path, token. Gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes = b"") -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            requests.append(f"{self.command} {path} {token}".strip())
            self.send(*respond(repositories, path, body))

        def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def respond(repositories: Repositories, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    api = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
    file = re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if api:
        kind, name, what, revision, below = api.groups()
    elif file:
        kind, name, what, revision, below = "datasets" if file[1] else "models", file[2], "file", file[3], file[4]
    else:
        return 404, {}, b""
    files = repositories.get(f"{kind}/{name}")
    if files is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if revision not in (None, "main", COMMIT):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if what == "file":
        if below not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        etag = hashlib.sha1(files[below]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, files[below]
    value: Any
    if what == "tree":
        value = [entry(path, files[path]) for path in files if path.startswith(below or "")]
    elif what == "paths-info":
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        value = [entry(path, files[path]) for path in asked if path in files]
    else:
        siblings = [{"rfilename": path} for path in files]
        value = {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
    return 200, {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}, json.dumps(value).encode()


def entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

"""A model hub on this host, with as much of the hub's interface as downloading a model needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub:
    """Serves the directories in `repositories` under their names, all of them at one commit."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.downloads: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answers as https://huggingface.co/.well-known/openapi.json describes."""
        path = request.path.partition("?")[0].removeprefix("/")
        name = next((name for name in self.repositories if name in path), None)
        if name is None:
            request.send_error(404)
        elif path.startswith(f"api/models/{name}/tree/"):
            self._answer_with(request, [self._described(file) for file in self._files(name)])
        elif path.startswith(f"api/models/{name}"):
            siblings = [{"rfilename": file.name} for file in self._files(name)]
            self._answer_with(request, {"id": name, "sha": self.COMMIT, "private": False, "siblings": siblings})
        elif path.startswith(f"{name}/resolve/"):
            self._answer_with_file(request, self.repositories[name] / path.rsplit("/", 1)[1])
        else:
            request.send_error(404)

    def _files(self, name: str) -> list[Path]:
        return sorted(file for file in self.repositories[name].iterdir() if file.is_file())

    def _described(self, file: Path) -> dict[str, Any]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}

    def _answer_with(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        body = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _answer_with_file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        if not file.is_file():
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        request.send_header("X-Repo-Commit", self.COMMIT)
        request.send_header("ETag", f'"{_digest(file)}"')
        request.send_header("Content-Length", str(file.stat().st_size))
        request.end_headers()
        if request.command == "GET":
            self.downloads.append(file.name)
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, request.wfile)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

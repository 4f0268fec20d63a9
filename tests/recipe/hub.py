"""A stand-in for the Hugging Face Hub: the folders of a directory, served as it serves models."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        address: for `HF_ENDPOINT`.
        weights: bytes sent of files of tensors, by file.
        requests: paths, in order.
    """

    address: str
    weights: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def served(folder: Path) -> Iterator[Hub]:
    """Serve `folder/owner/name` as the model `owner/name`, on this machine."""
    hub = Hub(address="")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            hub.requests.append(f"{self.command} {path}")
            model, _, name = path.strip("/").partition("/resolve/main/")
            file = folder / model / name
            if not (folder / model).is_dir():
                self._fail("RepoNotFound")
            elif not name or not file.is_file():
                self._fail("EntryNotFound")
            else:
                self._send(file, body=body)

        def _fail(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code}: {self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, file: Path, *, body: bool) -> None:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            asked = self.headers.get("Range")
            if asked is not None:
                first, last = asked.removeprefix("bytes=").split("-")
                content = content[int(first) : int(last or len(content)) + 1]
            self.send_response(206 if asked else 200)
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)
                if file.suffix in (".safetensors", ".bin"):
                    key = str(file.relative_to(folder))
                    hub.weights[key] = hub.weights.get(key, 0) + len(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A real HTTP server that answers as the hub does, for one model, and can break off."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MODEL = "somebody/small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, what it refuses, and what it was asked for."""

    folder: Path
    broken: Counter[str] = field(default_factory=Counter)
    """Files whose contents end in the middle, and how often."""
    refused: set[str] = field(default_factory=set)
    """Files that are answered with an error."""
    sent: list[tuple[str, str | None]] = field(default_factory=list)
    """Files that were sent, each with the range that was asked for."""

    def tree(self) -> list[dict[str, object]]:
        """Files with sizes, as the hub lists them."""
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.folder.iterdir())
        ]


def _handler(hub: Hub) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, *, send: bool) -> None:
            path = urlsplit(self.path).path
            if path.startswith(f"/api/models/{MODEL}/tree/"):
                return self._json(hub.tree())
            if path.startswith(f"/api/models/{MODEL}"):
                names = [{"rfilename": row["path"]} for row in hub.tree()]
                return self._json({"id": MODEL, "sha": COMMIT, "siblings": names})
            name = path.rpartition("/")[2]
            if not path.startswith(f"/{MODEL}/resolve/") or not (hub.folder / name).is_file():
                return self._status(404)
            if send and name in hub.refused:
                return self._status(403)
            return self._file(name, send=send)

        def _status(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, data: object) -> None:
            text = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _file(self, name: str, *, send: bool) -> None:
            data, asked = (hub.folder / name).read_bytes(), self.headers["Range"]
            found = re.fullmatch(r"bytes=(\d+)-", asked or "")
            start = int(found[1]) if found else 0
            self.send_response(206 if found else 200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - start))
            if found:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if send:
                hub.sent.append((name, asked))
                self._send(name, data[start:])

        def _send(self, name: str, data: bytes) -> None:
            if not hub.broken[name]:
                self.wfile.write(data)
                return
            hub.broken[name] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True

    return Handler


@contextlib.contextmanager
def serving_hub(hub: Hub) -> Iterator[str]:
    """The server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

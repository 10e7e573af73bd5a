"""A real HTTP server in a thread, whose routes a test writes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = Callable[[Body], Any]
"""Takes a request's body; gives an object, a list of lines to stream, a `Raw`, or a status and an
object."""


class Cut:
    """Ends a streamed answer without its end."""


@dataclass
class Raw:
    """An answer byte by byte, as no library would send it."""

    text: bytes = b""
    status: int = 200
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    missing_bytes: int = 0
    """Bytes that the head promises and the body does not have."""
    until: threading.Event | None = None
    """The server sends nothing before it is set."""


def _handler(routes: Mapping[str, Answer], seen: list[tuple[str, Body]]) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_GET(self) -> None:
            self._answer({"authorization": self.headers["Authorization"]})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(length)))

        def _answer(self, body: Body) -> None:
            seen.append((self.path, body))
            if self.path not in routes:
                return self._whole(404, {"error": {"message": "no such route"}})
            answer = routes[self.path](body)
            if isinstance(answer, list):
                return self._stream(answer)
            if isinstance(answer, Raw):
                return self._raw(answer)
            status, data = answer if isinstance(answer, tuple) else (200, answer)
            return self._whole(status, data)

        def _whole(self, status: int, data: Any) -> None:
            text = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _raw(self, answer: Raw) -> None:
            if answer.until is not None:
                answer.until.wait(60)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.text) + answer.missing_bytes))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.text)
            self.close_connection = True

        def _stream(self, lines: list[Any]) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in lines:
                if isinstance(line, Cut):
                    self.close_connection = True
                    return
                text = line.encode() + b"\n"
                self.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    return Handler


@contextlib.contextmanager
def serving(routes: Mapping[str, Answer]) -> Iterator[tuple[str, list[tuple[str, Body]]]]:
    """A server's address, and the requests that it has seen."""
    seen: list[tuple[str, Body]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(routes, seen))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

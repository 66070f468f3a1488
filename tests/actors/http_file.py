"""An HTTP server that holds one file, and answers range requests as it is told to."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Manner = Literal["ranges", "no ranges", "another range", "short"]


class HttpFile:
    """The server, on a port of its own. `manner` and `etag` may be changed while it serves."""

    def __init__(self, file: Path) -> None:
        self.manner: Manner = "ranges"
        self.etag = '"first"'
        self.requests = 0
        self._contents = file.read_bytes()
        held = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(200, len(held._contents))

            def do_GET(self) -> None:
                held.requests += 1
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if self.headers.get("If-Match", held.etag) != held.etag:
                    return self.answer(412, 0)
                if held.manner == "no ranges" or wanted is None:
                    return self.answer(200, len(held._contents), held._contents)
                first, last = int(wanted[1]), int(wanted[2])
                body = held._contents[first : last + 1]
                first += 4096 * (held.manner == "another range")
                span = f"bytes {first}-{last}/{len(held._contents)}"
                body = body[:-1] if held.manner == "short" else body
                return self.answer(206, len(body), body, span)

            def answer(self, status: int, length: int, body: bytes = b"", span: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.send_header("ETag", held.etag)
                if span is not None:
                    self.send_header("Content-Range", span)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except ConnectionError:
                    self.close_connection = True  # it was not listened to

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # a client that hangs up in the middle is one of the things that are tested

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{file.name}"

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.01)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(file: Path) -> Iterator[HttpFile]:
    """A server for that file, until the end of the block."""
    server = HttpFile(file)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()

"""A local HTTP server that fails on purpose."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FlakyServer:
    """Serves `files`; each request takes the next of `faults` (no fault when they are used up).

    Faults: an HTTP status; ("cut", n): n bytes, then the connection breaks; ("stall", n): n bytes, then silence; ("trickle", n): n
    bytes at a time, slowly; "whole": ranges are ignored; "unsized": no length; "shifted": a range that begins elsewhere;
    "compressed": says that the content is gzip.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: deque = deque()
        self.always: object = None
        self.requests: list[tuple[str, str]] = []  # path, Range header
        self.sent = 0
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, address: object) -> None:  # clients that went away
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        if self.closing.is_set():
            return
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, asked = request.path.partition("?")[0], request.headers.get("Range", "")
        self.requests.append((request.path, asked))
        fault = self.faults.popleft() if self.faults else self.always
        if isinstance(fault, int):
            request.send_error(fault)
            return
        if path.endswith("/") or path not in self.files:
            links = "".join(f'<a href="{name}">{name}</a>' for name in sorted(self.files) if name.startswith(path))
            body = f"<html>{links}</html>".encode()
            request.send_response(200 if path.endswith("/") else 404)
            request.send_header("Content-Type", "text/html")
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return
        self._send(request, self.files[path], asked, fault)

    def _send(self, request: BaseHTTPRequestHandler, data: bytes, asked: str, fault: object) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if match and fault not in ("whole", "unsized"):
            start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else len(data), len(data))
            if start >= len(data):
                request.send_error(416)
                return
            request.send_response(206)
            shift = 1 if fault == "shifted" else 0
            request.send_header("Content-Range", f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}")
            body = data[start:stop]
        else:
            request.send_response(200)
            body = data
        if fault == "unsized":
            request.send_header("Connection", "close")
        else:
            request.send_header("Content-Length", str(len(body)))
        if fault == "compressed":
            request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        kind, count = fault if isinstance(fault, tuple) else ("", len(body))
        self.sent += min(count, len(body))
        if kind == "trickle":
            for at in range(0, len(body), count):
                request.wfile.write(body[at : at + count])
                if self.closing.wait(0.05):
                    break
            return
        request.wfile.write(body[:count])
        request.wfile.flush()
        if kind == "stall":
            self.closing.wait(20)
        if kind:
            request.close_connection = True
            request.connection.close()


def wait_for(condition, seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)

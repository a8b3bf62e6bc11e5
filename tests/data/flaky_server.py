"""A local HTTP server that fails on purpose."""

from __future__ import annotations

import re
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FlakyServer:
    """Serves `files`; each request uses the next of `faults`, then `always`.

    Faults: an HTTP status; ("cut", n): n bytes, then the connection breaks; ("stall", n): n bytes,
    then silence; ("trickle", n): n bytes at a time, slowly; "whole": ranges are ignored; "unsized":
    no length; "shifted": another range; "compressed": the content type is gzip.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: deque = deque()
        self.always: object = None
        self.requests: list[tuple[str, str]] = []  # path, Range header
        self.sent = 0
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:  # clients that went away
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FlakyServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        owner, path, asked = self.owner, self.path.partition("?")[0], self.headers.get("Range", "")
        owner.requests.append((self.path, asked))
        fault = owner.faults.popleft() if owner.faults else owner.always
        if isinstance(fault, int):
            self.send_error(fault)
        elif path.endswith("/"):
            links = "".join(
                f'<a href="{name}">{name}</a>' for name in sorted(owner.files) if name.startswith(path)
            )
            self.answer(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"}, None)
        elif path not in owner.files:
            self.send_error(404)
        else:
            self.send_part(owner.files[path], asked, fault)

    def send_part(self, data: bytes, asked: str, fault: object) -> None:
        headers = {"Content-Encoding": "gzip"} if fault == "compressed" else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if not match or fault in ("whole", "unsized"):
            return self.answer(200, data, headers, fault)
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else len(data), len(data))
        if start >= len(data):
            return self.send_error(416)
        shift = 1 if fault == "shifted" else 0
        headers["Content-Range"] = f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}"
        return self.answer(206, data[start:stop], headers, fault)

    def answer(self, status: int, body: bytes, headers: dict[str, str], fault: object) -> None:
        length = {"Connection": "close"} if fault == "unsized" else {"Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in {**headers, **length}.items():
            self.send_header(name, value)
        self.end_headers()
        kind, count = fault if isinstance(fault, tuple) else ("", len(body))
        self.owner.sent += min(count, len(body))
        if kind == "trickle":
            for at in range(0, len(body), count):
                self.wfile.write(body[at : at + count])
                if self.owner.closing.wait(0.05):
                    return
            return
        self.wfile.write(body[:count])
        self.wfile.flush()
        if kind == "stall":
            self.owner.closing.wait(20)
        if kind:
            self.close_connection = True
            self.connection.close()

# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that answers as it is told to, well or badly. Each behaviour is one handler of a POST."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.0"  # the end of the connection is the end of the stream

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(json.dumps({"data": [{"id": "fake"}]}))
        elif self.path == "/metrics" and self.server.metrics is not None:
            self._send(self.server.metrics())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if self.path == "/flush_cache":
            self.server.flushes += 1
            self.send_error(self.server.flush_status) if self.server.flush_status != 200 else self._send("flushed")
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that gave up
            self.server.reply(self, body)

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply, metrics: Callable[[], str] | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.metrics = reply, metrics
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.flushes, self.flush_status = 0, 200
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def kill(self) -> None:
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def fake_server(reply: Reply, metrics: Callable[[], str] | None = None) -> Iterator[FakeServer]:
    server = FakeServer(reply, metrics)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.kill()
        thread.join()


def chunk(text: str, tokens: int | None, finish: str | None = None) -> dict[str, Any]:
    """One chunk of a chat completion; `tokens`: how many there are so far."""
    found: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    if tokens is not None:
        found["usage"] = {"prompt_tokens": 5, "completion_tokens": tokens}
    return found


def usage(tokens: int, **extra: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}, **extra}


def answer(handler: Handler, body: dict[str, Any]) -> None:
    """A good answer: seven tokens in three chunks."""
    handler.start_stream()
    handler.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    handler.event(chunk("a", 1))
    handler.event(chunk("bcd", 4))
    handler.event(chunk("efg", 7, "stop"))
    handler.event(usage(7))
    handler.event("[DONE]")


def error_500(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_error(500)


def bad_json(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", 1))
    handler.event('{"choices": [')


def bad_sse(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", 1))
    handler.wfile.write(b"<html>Bad gateway</html>\n\n")


def truncated(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", 1))


def cut(handler: Handler, body: dict[str, Any]) -> None:
    """Less than the length it had promised, so that the transport itself breaks."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.event(chunk("a", 1))


def cut_before_a_token(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    """Not even a status."""


def no_choices_field(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event({"id": "x"})


def no_usage(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", None, "stop"))
    handler.event("[DONE]")


def content_that_is_no_text(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event({"choices": [{"index": 0, "delta": {"content": ["a"]}, "finish_reason": "stop"}]})
    handler.event(usage(3))
    handler.event("[DONE]")


def aborted(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", 1))
    handler.event(chunk("", 1, "abort"))
    handler.event(usage(1))
    handler.event("[DONE]")


def empty_choices(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(usage(3))
    handler.event("[DONE]")


def error_in_stream(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event({"error": {"message": "out of memory"}})


def slow(handler: Handler, body: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event(chunk("a", 1))
    time.sleep(20)

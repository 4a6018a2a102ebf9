"""A small server of OpenAI's chat protocol on loopback, for tests: answers by a function, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# What a request's chat is answered with: a text, or an HTTP status.
Reply = Callable[[list[dict[str, Any]]], "str | int"]


class ChatStub:
    """`reply` may be changed while it runs. `bodies`: what was asked, in order. `models`: the names it says it serves."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["m"]
        self.lock = threading.Lock()

    def asked(self) -> list[str]:
        """The text of each request's last turn."""
        return [said(body["messages"]) for body in self.bodies]


def said(messages: list[dict[str, Any]]) -> str:
    """The text of the last turn."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


@contextlib.contextmanager
def quick_retries() -> Iterator[None]:
    """OpenAI's client asks again after a hundredth of a second, for the time of a block."""
    from openai import _base_client

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
        yield


@contextlib.contextmanager
def chat_server(reply: Reply) -> Iterator[ChatStub]:
    """The server for the time of a block, in which clients are quick to ask again."""
    stub = ChatStub(reply)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in stub.models]
            self.send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.bodies.append(body)
                stub.keys.append(self.headers.get("Authorization"))
            answer = stub.reply(body["messages"])
            if isinstance(answer, int):
                return self.send(answer, {"error": {"message": "no, thanks"}})
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return self.send(
                200,
                {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]},
            )

        def send(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is no news."""

    with quick_retries(), Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        stub.url = f"http://127.0.0.1:{running.server_port}/v1"
        try:
            yield stub
        finally:
            running.shutdown()
            thread.join()


def nobody() -> str:
    """The URL of a server that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"

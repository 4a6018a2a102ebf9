"""The page's server: Python's own, on loopback, bounded in all that it takes.

    GET  /            the page, whole in one file
    GET  /about       what is offered, JSON
    GET  /clips/ID    a sound as WAV
    POST /clips       a sound file as the body -> its clip, JSON
    POST /describe    {"clip"} -> events
    POST /ask         see `asked.Asked` -> events

Events are JSON lines, sent as they happen. Whatever cannot be done is `{"error": SENTENCE}` or an event with one. Other web sites can
neither ask (`Origin`) nor read, even where their name has been pointed at loopback (`Host`).
"""

from __future__ import annotations

import errno
import http.server
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable
from typing import Any

from speech_llm.audio import wav_bytes
from speech_llm.demo.app import Demo, Stopped
from speech_llm.demo.asked import MAX_JSON_BYTES, read_asked, read_described
from speech_llm.demo.clips import MAX_BYTES, TooLong
from speech_llm.demo.line import LineFull
from speech_llm.demo.page import Page
from speech_llm.errors import UserError

CONNECTIONS = 64
# How long a connection may say nothing while it is read from or written to.
TIMEOUT_S = 30.0
OURS = "something went wrong on this side; the terminal in which the page was started says what"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The name in a `Host` header, without the port, lower case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def may_be_called(name: str, host: str) -> bool:
    """Whether a server on `host` answers to this name: never to one that someone else's name server could have invented."""
    if is_loopback(host):
        return is_loopback(name)
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in ("localhost", host.lower(), socket.gethostname().lower())


class Server(http.server.ThreadingHTTPServer):
    """Serves one `Demo` until `shutdown`. Raises `UserError` where it cannot listen."""

    daemon_threads = True

    def __init__(self, demo: Demo, host: str = "127.0.0.1", port: int = 0) -> None:
        self.demo, self.host, self.page = demo, host, Page()
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        # Sounds are held in memory while they are read; no more than two at a time.
        self.reading = threading.BoundedSemaphore(2)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = found[0]
            super().__init__(found[4][:2], Handler)  # type: ignore[arg-type]
        except PermissionError:
            raise UserError(
                f"port {port} may not be used by you; choose one above 1023 with --port"
            ) from None
        except socket.gaierror:
            raise UserError(f"--host {host}: this is no address of this machine") from None
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host}: this is no address of this machine") from None
            raise UserError(
                f"port {port} of {host} cannot be used ({getattr(error, 'strerror', None) or error}); choose another with --port, "
                "or --port 0 for any that is free"
            ) from None

    def server_bind(self) -> None:
        """Without asking a name server what we are called, which the library's own does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "") else "[::1]" if self.host == "::" else self.host
        if ":" in shown and not shown.startswith("["):
            shown = f"[{shown}]"
        return f"http://{shown}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], (OSError, Stopped)):
            traceback.print_exc()


class Refused(Exception):
    """A request that is not answered: an HTTP status and a sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    server: Server

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _get(self) -> None:
        demo = self.server.demo
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page.body, self.server.page.policy)
        elif self.path == "/about":
            self._json(200, demo.about())
        elif self.path.startswith("/clips/"):
            # The id is looked up and nothing else: it is no part of any path.
            clip = demo.clips.get(self.path.removeprefix("/clips/"))
            self._send(200, "audio/wav", wav_bytes(clip.path))
        else:
            raise Refused(404, "there is no such page")

    def _post(self) -> None:
        demo = self.server.demo
        if self.path == "/clips":
            name = urllib.parse.unquote(self.headers.get("X-File-Name", ""), errors="replace")
            with self.server.reading:
                clip = demo.add(self._body(MAX_BYTES), name)
            self._json(200, clip.shown())
        elif self.path == "/describe":
            wanted = read_described(self._body(MAX_JSON_BYTES))
            self._events(lambda emit: demo.describe(wanted.clip, emit))
        elif self.path == "/ask":
            asked = read_asked(self._body(MAX_JSON_BYTES))
            self._events(lambda emit: demo.ask(asked, emit))
        else:
            raise Refused(404, "there is no such page")

    def _guarded(self, answer: Callable[[], None]) -> None:
        """Answer, or say in one sentence why not."""
        try:
            self._check_origin()
            answer()
        except Refused as error:
            self.close_connection = True  # what was sent with it has not been read
            self._json(error.status, {"error": str(error)})
        except LineFull as error:
            self._json(503, {"error": str(error)})
        except TooLong as error:
            self._json(422, {"error": str(error), "too_long": True})
        except UserError as error:
            self._json(422, {"error": " ".join(str(error).split())})
        except (OSError, Stopped):
            self.close_connection = True  # the browser has gone, or we are about to
        except Exception:
            traceback.print_exc()
            self.close_connection = True
            self._json(500, {"error": OURS})

    def _check_origin(self) -> None:
        host = self.headers.get("Host", "")
        if not may_be_called(host_of(host), self.server.host):
            raise Refused(
                403,
                f"this page is not called {host_of(host)[:80]!r}; open the address that the terminal shows",
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "another web site asked for this, which is not allowed")

    def _body(self, most: int) -> bytes:
        """The request's body, of at most so many bytes."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if length < 0 or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the request does not say how long it is")
        if length > most:
            raise Refused(
                413, f"{length / 2**20:.0f} MB is more than the {most / 2**20:g} MB that may be sent at once"
            )
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, "the request ended early")
        return body

    def _events(self, work: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
        """JSON lines as they happen. What fails before the first of them is an ordinary refusal."""
        begun = False

        def emit(event: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self.send_response(200)
                self._headers("application/x-ndjson")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
            self._chunk(json.dumps(event, ensure_ascii=False).encode() + b"\n")

        try:
            work(emit)
        except (OSError, Stopped):
            raise
        except UserError as error:
            if not begun:
                raise
            emit({"event": "error", "error": " ".join(str(error).split())})
        except Exception:
            if not begun:
                raise
            traceback.print_exc()
            emit({"event": "error", "error": OURS})
        if begun:
            self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value, ensure_ascii=False).encode())

    def _send(self, status: int, kind: str, body: bytes, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        self._headers(kind, policy)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _headers(self, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", f"{policy}; frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")

    def version_string(self) -> str:
        return "speech-llm"

    def log_message(self, *_: Any) -> None:
        """The terminal is for what a person should read."""

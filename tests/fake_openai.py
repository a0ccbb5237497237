"""A stand-in for an OpenAI-compatible endpoint: a real HTTP server on loopback that answers, or fails, as told.

    with FakeOpenAI(lambda messages: "你好", {"Hi": [Status(429, retry_after=1), CUT]}) as server:
        …  # base_url=server.url

The script is looked up by the last message: its behaviours are used up one a call, before calls with that message are
answered. A behaviour is a text to answer, or one of those below. `server.calls` has every request as it came.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Status:
    """An HTTP error; "{authorization}" in the message becomes the request's header, as careless servers do it."""

    code: int
    message: str = "no"
    retry_after: float | None = None


@dataclasses.dataclass(frozen=True)
class Body:
    """A body sent as it is, with status 200."""

    content: bytes
    content_type: str = "application/json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A completion whose only choice is changed: finish_reason, or fields of its message; usage and model, too."""

    finish_reason: str = "stop"
    message: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    usage: Any = None
    model: Any = None


STALL = "STALL"  # no byte until the client goes away or the server is closed
CUT = "CUT"  # the connection ends before a byte of the answer
DRIP = "DRIP"  # a byte every tenth of a second until the client goes away or the server is closed
CUT_MIDWAY = "CUT_MIDWAY"  # half of the answer, then the connection ends
GARBAGE = Body(b"<html>Bad gateway</html>", "text/html")
INVALID_JSON = Body(b'{"choices": [')
EMPTY = Choice(message={"content": ""})

Behaviour = str | Status | Body | Choice


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: its last message, body, Authorization header and time.monotonic()."""

    text: str
    body: dict[str, Any]
    authorization: str | None
    when: float


class FakeOpenAI:
    """The server; use it in a with statement. `answer` gets all messages; `delay` seconds pass before an answer."""

    def __init__(
        self,
        answer: Callable[[Messages], Behaviour],
        script: Mapping[str, Sequence[Behaviour]] | None = None,
        delay: float = 0,
    ):
        self.answer = answer
        self.script = {text: list(behaviours) for text, behaviours in (script or {}).items()}
        self.delay = delay
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def texts(self) -> list[str]:
        """The last message of every request."""
        return [call.text for call in self.calls]

    def __enter__(self) -> "FakeOpenAI":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        """Reads one request and behaves."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self._lock:
            self.calls.append(Call(text, body, handler.headers.get("Authorization"), time.monotonic()))
            queue = self.script.get(text)
            behaviour = queue.pop(0) if queue else self.answer(body["messages"])
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._closed.wait(self.delay)
            if behaviour == STALL:
                self._closed.wait()
            if behaviour in (STALL, CUT):
                handler.close_connection = True
            else:
                self._send(handler, body, behaviour)
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], behaviour: Behaviour) -> None:
        code, content_type, headers = 200, "application/json", {}
        if isinstance(behaviour, Status):
            code = behaviour.code
            message = behaviour.message.replace("{authorization}", handler.headers.get("Authorization", ""))
            content = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
            if behaviour.retry_after is not None:
                headers["Retry-After"] = str(behaviour.retry_after)
        elif isinstance(behaviour, Body):
            content, content_type = behaviour.content, behaviour.content_type
        else:
            content = json.dumps(_completion(body, behaviour)).encode()
        handler.send_response(code)
        for name, value in {"Content-Type": content_type, "Content-Length": len(content), **headers}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        if behaviour == DRIP:
            while not self._closed.wait(0.1):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        if behaviour == CUT_MIDWAY:
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(content)
        handler.wfile.flush()


def _completion(body: dict[str, Any], behaviour: str | Choice) -> dict[str, Any]:
    """A chat completion; a token is a character."""
    choice = behaviour if isinstance(behaviour, Choice) else Choice(message={"content": behaviour})
    message = {"role": "assistant", "content": "text", **choice.message}
    prompt = sum(len(message["content"]) for message in body["messages"])
    reply = len(message["content"] or "")
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": choice.model or body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": choice.finish_reason}],
        "usage": choice.usage or {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests go away in the middle: nothing to tell."""


def _handler(fake: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body leave in one packet

        def do_POST(self) -> None:
            if self.path == "/v1/chat/completions":
                fake.respond(self)
            else:
                self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Keeps the tests' output clean."""

    return Handler

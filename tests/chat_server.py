"""A small OpenAI-compatible server on the loopback interface: answers from a function, and faults on demand.

with ChatServer(lambda text, seed: text.upper()) as server:
    server.refuse = lambda text: 400 if "x" in text else None
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads do. In an answer of a server, it brings requests into a known order."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited in vain for a minute"
        time.sleep(0.01)


class ChatServer:
    """
    Serves `/v1/chat/completions` and `/v1/completions` until the `with` block ends.

    Args:
        answer (`Callable[[str, int], str]`): the completion of a prompt (of a chat, its last message) and a seed.

    Attributes:
        url (`str`): where, with a port of its own.
        asked (`list[dict]`): the bodies of all requests.
        refuse (`Callable[[str], int | None]`): the status with which a prompt is refused.
        refuse_with (`str`): the message of a refusal.
        finish_reason (`str`): of all completions.
        at_most (`int`): completions in one answer, whatever is asked for.
        key (`str`): what requests must carry, if not empty; a refusal repeats what they carry.
        headers (`dict[str, str]`): of the last request.
        retry_after (`str`): sent with each refusal, if not empty.
        alter (`Callable`): given a prompt and its good answer, returns what is sent instead with status 200, as an
            object or as text.
    """

    def __init__(self, answer: Callable[[str, int], str]):
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.refuse: Callable[[str], int | None] = lambda text: None
        self.finish_reason, self.at_most, self.key = "stop", 100, ""
        self.headers: dict[str, str] = {}
        self.retry_after, self.refuse_with = "", "told to refuse"
        self.alter: Callable[[str, dict[str, Any]], Any] = lambda text, answer: answer
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body)
        chat = path == "/v1/chat/completions"
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if status := self.refuse(text):
            return status, {"error": {"message": self.refuse_with}}
        choices = []
        for i in range(min(body.get("n", 1), self.at_most)):
            said = self.answer(text, body.get("seed", 0) + i)
            content = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
            choices.append({"index": i, "finish_reason": self.finish_reason, **content})
        return 200, self.alter(text, {"object": "completion", "model": body["model"], "choices": choices})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: ChatServer

    def do_POST(self) -> None:
        server = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status: int = 404
        content: Any = {"error": {"message": "no such path"}}
        server.headers = dict(self.headers)
        carried = self.headers.get("Authorization")
        if server.key and carried != f"Bearer {server.key}":
            status, content = 401, {"error": {"message": f"wrong key {carried}"}}
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            status, content = server.respond(self.path, body)
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status != 200 and server.retry_after:
            self.send_header("Retry-After", server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

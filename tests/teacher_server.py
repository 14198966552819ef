"""A small teacher server on the loopback interface: vLLM's wire format from a tiny model, and faults on demand.

with TeacherServer(model) as server:
    server.fail("drop", times=2)
    ServedTeacher(server.url, model="teacher").score(rollouts)
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class TeacherServer:
    """
    Serves `/v1/models` and `/v1/completions` until the `with` block ends.

    Attributes:
        url (`str`): where, with a port of its own.
        count (`int`): requests that have come in, failed ones too.
        asked (`list[dict]`): the bodies of the completion requests that were answered.
        headers (`dict[str, str]`): of the last request.
        alter (`Callable`): what is applied to each parsed answer of `/v1/completions`; returns what is sent instead, as
            an object or as text.
    """

    def __init__(self, model: Any, name: str = "teacher", max_logprobs: int = 20, max_model_len: int = 64):
        self.model, self.name = model.eval(), name
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.count = 0
        self.asked: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.alter: Callable[[Any], Any] | None = None
        self._lock = threading.Lock()
        self._fault: tuple[str, float, Any] = ("", 0, None)  # its name, for how many requests, its value
        self._closing = threading.Event()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"teacher": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> TeacherServer:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # ends stalls
        self._http.shutdown()
        self._http.server_close()

    def fail(self, fault: str, times: float = float("inf"), value: Any = None) -> None:
        """
        Let the next `times` requests fail.

        Args:
            fault: "drop" (close without a byte), "break" (close in the middle of the body), "stall" (say nothing),
                "status" (`value` is it, or it and a Retry-After), "cut" (JSON that ends early, in a whole response),
                "shuffle" (positions in reverse order).
        """
        self._fault = (fault, times, value)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and content for a completion request."""
        k = body.get("prompt_logprobs")
        if body["model"] != self.name:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if k is not None and k > self.max_logprobs:
            allowed = f"which is greater than max allowed: {self.max_logprobs}"
            return _error(400, f"Requested prompt logprobs of {k}, {allowed}")
        longest = max(map(len, body["prompt"]))
        if longest + body["max_tokens"] > self.max_model_len:
            limit = f"This model's maximum context length is {self.max_model_len} tokens."
            return _error(400, f"{limit} However, your prompt contains {longest} input tokens")
        self.asked.append(body)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            log_probs = None if k is None else self._prompt_log_probs(ids, k)
            echo = ids if body.get("return_token_ids") else None
            choice = {"index": index, "text": "", "logprobs": None, "finish_reason": "length"}
            choices.append({**choice, "prompt_logprobs": log_probs, "prompt_token_ids": echo})
        return 200, {"id": "cmpl-0", "object": "text_completion", "model": self.name, "choices": choices}

    @torch.no_grad()
    def _prompt_log_probs(self, ids: list[int], k: int) -> list[Any]:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        result: list[Any] = [None]
        for token, log_p in zip(ids[1:], logits.log_softmax(-1), strict=True):
            ranked = [(token, int((log_p >= log_p[token]).sum()))]
            ranked += [(i, rank) for rank, i in enumerate(log_p.topk(k).indices.tolist(), start=1)]
            # the token comes first and keeps its place when it is met again among the likeliest
            result.append(
                {
                    str(i): {"logprob": max(log_p[i].item(), -9999.0), "rank": rank, "decoded_token": f"<{i}>"}
                    for i, rank in ranked
                }
            )
        return result

    def next_fault(self) -> tuple[str, Any]:
        """Count a request, and say what is to go wrong with it."""
        with self._lock:
            self.count += 1
            fault, times, value = self._fault
            self._fault = (fault, times - 1, value)
            return (fault, value) if times > 0 else ("", None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Say nothing about clients that gave up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    teacher: TeacherServer

    def do_GET(self) -> None:
        card = {"id": self.teacher.name, "object": "model", "max_model_len": self.teacher.max_model_len}
        self._respond(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._respond(*(self.teacher.answer(body) if self.path == "/v1/completions" else _error(404, "Not Found")))

    def _respond(self, status: int, content: Any) -> None:
        teacher = self.teacher
        teacher.headers = dict(self.headers)
        fault, value = teacher.next_fault()
        headers = {}
        if fault == "stall":
            teacher._closing.wait(30)
        elif fault == "status":
            status, *after = value if isinstance(value, tuple) else (value,)
            headers = {"Retry-After": str(after[0])} if after else {}
            content = _error(status, "told to fail")[1]
        elif status == 200 and "choices" in content:
            if fault == "shuffle":
                for choice in content["choices"]:
                    choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][:0:-1]]
            if teacher.alter:
                content = teacher.alter(content)
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        if fault == "cut":
            data = data[: len(data) // 2]
        if fault in ("drop", "stall"):
            return self._hang_up()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "break" else data)
        if fault == "break":
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}

"""An OpenAI-compatible endpoint on the loopback interface that costs next to nothing: fixed answers after a fixed time.

    python -m scripts.studies.synthetic.loopback --delay 0.05

It prints its port. `GET /stats` answers with what it saw: requests, the most under way at once, the seconds between the
first request and the last answer, and the seconds that all requests were under way, summed. Left out on purpose:
reading the requests, and every answer but the good one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time


LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Seen:
    """What the endpoint saw."""

    def __init__(self) -> None:
        self.requests = self.now = self.most = 0
        self.first = self.last = self.summed = 0.0

    def begin(self) -> None:
        """A request has come."""
        at = time.perf_counter()
        if not self.requests:
            self.first = at
        self.requests, self.now = self.requests + 1, self.now + 1
        self.most = max(self.most, self.now)
        self.summed -= at

    def end(self) -> None:
        """An answer leaves."""
        self.last = time.perf_counter()
        self.now, self.summed = self.now - 1, self.summed + self.last

    def as_json(self) -> bytes:
        found = {"requests": self.requests, "most": self.most, "wall_s": self.last - self.first, "busy_s": self.summed}
        return json.dumps(found).encode()


class Answering(asyncio.Protocol):
    """
    One connection, one request at a time.

    Args:
        seen (`Seen`): shared by all connections.
        delay (`float`): seconds before each answer.
        text (`str`): words of each answer, after a number of its own.
    """

    def __init__(self, seen: Seen, delay: float, text: str):
        self.seen, self.delay, self.text, self.buffer = seen, delay, text, b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = LENGTH.search(self.buffer, 0, head)
        if len(self.buffer) < head + 4 + (int(length[1]) if length else 0):
            return
        is_stats, self.buffer = self.buffer.startswith(b"GET /stats"), b""
        if is_stats:
            self.send(self.seen.as_json())
            return
        self.seen.begin()
        if self.delay:
            self.loop.call_later(self.delay, self.answer)
        else:
            self.answer()

    def answer(self) -> None:
        """Send the completion."""
        self.seen.end()
        message = {"role": "assistant", "content": f"{self.seen.requests} {self.text}"}
        self.send(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())

    def send(self, content: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
        self.transport.write(head + content)


async def serve(delay: float, text: str) -> None:
    """Serve until the process is ended."""
    seen = Seen()
    server = await asyncio.get_running_loop().create_server(lambda: Answering(seen, delay, text), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0, help="Seconds before each answer.")
    parser.add_argument("--text", default="words of an answer that differs from all others", help="What is answered.")
    given = parser.parse_args()
    asyncio.run(serve(given.delay, given.text))

"""A teacher behind vLLM's HTTP server: log-probabilities of the sampled tokens, and the teacher's own top k.

    vllm serve Qwen/Qwen3-8B --max-logprobs 64

The protocol is that of vLLM 0.33, unchanged since 0.22: `/v1/completions`, `prompt_logprobs` and `return_token_ids`.
An answer is taken only if every position in it fits what was asked; anything else is an error, never a number. When to
ask is left to the caller, what is computed from the signal to `estimators/`.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from ..errors import TeacherAnswerError, TeacherUnavailable
from ..http_client import HTTPClient, NoAnswerError, ServerURL, Settings, StatusError, read_url
from ..rollouts import Rollouts
from ..signals import TokenLogProbs
from .base import Teacher
from .server_answers import Row, TokenScore, read_answer, read_models


logger = logging.getLogger(__name__)


T = TypeVar("T")


ADVICE = {  # what to do about a server's complaint
    "max allowed": "Start the server with `--max-logprobs` of at least `top_k` (the run's `kl_top_k`), or lower it.",
    "maximum context length": "Start the server with a larger `--max-model-len`, or shorten prompts and completions.",
    "not JSON compliant": "The teacher computes NaN: look at its weights and at the server's `--dtype`.",
}


class ServedTeacher(Teacher):
    """
    A teacher that one or several vLLM servers run. They must serve the same weights.

    Every training process asks for its own rollouts. A request that fails for a passing reason (no connection, a
    time-out, HTTP 408, 409, 425, 429 or 5xx) is sent again, to another URL if there is one, without a pause until all
    have been tried once and with exponentially growing ones from then on.

    Args:
        urls (`str` or `list[str]`): where the servers listen, with or without `/v1`. A login in one
            (`http://user:password@host`) is sent, and shown nowhere.
        model (`str`): the first name under which they serve it.
        top_k (`int`): the teacher's likeliest ids to ask for beside the sampled token. The server's `--max-logprobs`
            (20 unless set) must allow it.
        timeout (`float`): seconds without a byte from the server, its queue included, after which a request has failed.
        retries (`int`): further attempts after a failed one.
        backoff (`float`): seconds of the first pause, about; doubled from each to the next, at most 30.
        concurrency (`int`): requests under way at once.
        rows_per_request (`int`): sequences in one request.
        api_key (`str`): the server's `--api-key`.
    """

    gives = TokenLogProbs
    per_generation = True  # whole generation batches keep the server busy, and waiting is done once
    temperature = 1.0  # `prompt_logprobs` know no other
    top_k: int

    def __init__(
        self,
        urls: str | list[str],
        model: str,
        top_k: int = 0,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
        concurrency: int = 16,
        rows_per_request: int = 4,
        api_key: str | None = None,
    ):
        if min(top_k, retries, backoff) < 0 or min(timeout, concurrency, rows_per_request) <= 0:
            raise ValueError(
                "`top_k`, `retries` and `backoff` cannot be negative, `timeout`, `concurrency` and `rows_per_request` "
                f"must be positive; found {top_k}, {retries}, {backoff}, {timeout}, {concurrency}, {rows_per_request}."
            )
        servers = [_server(url) for url in ([urls] if isinstance(urls, str) else urls)]
        self.urls = list(dict.fromkeys(server.base for server in servers))
        if not self.urls:
            raise ValueError("`urls` is empty. Name at least one server, such as 'http://localhost:8000'.")
        self.model = model
        self.top_k = top_k
        self.rows_per_request = rows_per_request
        self._turn = itertools.count()
        settings = Settings(
            timeout,
            retries,
            backoff,
            concurrency,
            who="the teacher",
            names={name: f"`{name}`" for name in ("timeout", "retries", "concurrency")},
            key_advice="Pass the server's key as `api_key`.",
        )
        self._client = HTTPClient(settings, servers, api_key)

    def score(self, rollouts: Rollouts) -> TokenLogProbs:
        """
        Judge the tokens that `rollouts.mask` marks; rows without any are not sent.

        Raises:
            TeacherUnavailable: no answer within the time-outs and retries.
            TeacherAnswerError: the server refused, or its answer does not fit the question.
            ValueError: padding, or a token with nothing before it, is marked.
        """
        rows, size = _rows(rollouts), self.rows_per_request
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = self._client.all([partial(self._judge, batch) for batch in batches])
        judgements = list(itertools.chain.from_iterable(answers))  # N
        log_p, top_ids, top_log_p = zip(*judgements, strict=True) if judgements else ((), (), ())
        device, shape = rollouts.input_ids.device, (len(judgements), self.top_k)
        return TokenLogProbs(
            log_p=torch.tensor(log_p, dtype=torch.float32, device=device),  # (N,)
            top_ids=torch.tensor(top_ids, dtype=torch.int64, device=device).reshape(shape),  # (N, K)
            top_log_p=torch.tensor(top_log_p, dtype=torch.float32, device=device).reshape(shape),  # (N, K)
        )

    def check(self) -> None:
        """
        Ask every server for its models and for one small judgement; to be called before training.

        Raises:
            TeacherUnavailable: none of them answers. Where only some do not, a warning is logged.
            TeacherAnswerError: one of them cannot give what `score` will ask for.
            ValueError: one of them does not serve `model`.
        """
        failures = [
            failure for failure in self._client.all([partial(self._visit, url) for url in self.urls]) if failure
        ]
        if len(failures) == len(self.urls):
            raise TeacherUnavailable(" ".join(map(str, failures)))
        for failure in failures:
            logger.warning("Training goes on without one of the teacher's servers. %s", failure)

    def close(self) -> None:
        """Close the connections. Nothing can be asked afterwards."""
        self._client.close()

    def _judge(self, rows: list[Row], halt: threading.Event, urls: list[str] | None = None) -> list[TokenScore]:
        body = {
            "model": self.model,
            "prompt": [row.ids for row in rows],
            "prompt_logprobs": max(self.top_k, 1),  # 0 escapes vLLM's check that fast prefill is off
            "return_token_ids": True,
            "add_special_tokens": False,
            "temperature": 1.0,
            "max_tokens": 1,  # the least that vLLM takes
        }
        read = partial(read_answer, rows=rows, model=self.model, top_k=self.top_k)
        return self._ask(urls or self._next_urls(), "/completions", body, read, halt)

    def _visit(self, url: str, halt: threading.Event) -> TeacherUnavailable | None:
        """Check one server; the error if it does not answer."""
        try:
            models = self._ask([url], "/models", None, read_models, halt)
            if self.model not in models:
                raise ValueError(
                    f"{url} does not serve `model='{self.model}'` but {models}. Pass one of these names, or start the "
                    f"server with `--served-model-name {self.model}`."
                )
            self._judge([Row(0, [0, 1], []), Row(1, [1, 0], [])], halt, [url])
        except TeacherUnavailable as error:
            return error
        return None

    def _next_urls(self) -> list[str]:
        """All URLs, each in turn first."""
        start = next(self._turn) % len(self.urls)
        return self.urls[start:] + self.urls[:start]

    def _ask(
        self, urls: list[str], path: str, body: dict[str, Any] | None, read: Callable[[bytes], T], halt: threading.Event
    ) -> T:
        """What `read` makes of the answer to one question, with the client's errors as the teacher's."""

        def understood(url: str, content: bytes) -> T:
            try:
                return read(content)
            except TeacherAnswerError as error:
                raise TeacherAnswerError(f"The answer of {url} cannot be used: {error}") from None

        try:
            return self._client.ask(urls, path, body, understood, halt)
        except NoAnswerError as error:
            raise TeacherUnavailable(str(error)) from error
        except StatusError as error:
            advice = [text for sign, text in ADVICE.items() if sign in str(error)]
            raise TeacherAnswerError(" ".join([str(error), *advice])) from error


def _rows(rollouts: Rollouts) -> list[Row]:
    """The rows with judged tokens, without padding."""
    prompt = rollouts.input_ids.shape[1] - rollouts.mask.shape[1]
    attended = rollouts.attention_mask.bool()  # (B, P + C)
    judged = torch.nn.functional.pad(rollouts.mask.bool(), (prompt, 0))  # (B, P + C)
    if (judged & ~attended).any():
        raise ValueError("`rollouts.mask` marks padding. Mark only tokens that `rollouts.attention_mask` keeps.")
    rows = []
    for index in judged.any(dim=1).nonzero().flatten().tolist():
        kept = attended[index]
        positions = judged[index][kept].nonzero().flatten().tolist()
        if positions[0] == 0:
            raise ValueError(
                f"Row {index}: its first token is judged, but a teacher cannot judge a token with nothing before it. "
                "Give every prompt at least one token."
            )
        rows.append(Row(index, rollouts.input_ids[index][kept].tolist(), positions))
    return rows


def _server(url: str) -> ServerURL:
    """A server's URL with `/v1` at its end."""
    server = read_url(url, "`urls`")
    return replace(server, base=server.base.removesuffix("/v1") + "/v1")

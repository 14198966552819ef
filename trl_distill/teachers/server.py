"""A teacher served by vLLM: log-probabilities of the sampled tokens, and the teacher's top k.

    vllm serve Qwen/Qwen3-8B --max-logprobs 64

The protocol is that of vLLM 0.33, unchanged since 0.22: `/v1/completions`, `prompt_logprobs` and `return_token_ids`.
An answer is accepted only if every position in it matches the request; anything else is an error. `pool.py` decides
when to ask, and `estimators/` compute the divergence.
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
from ..http_client import HTTPClient, NoAnswerError, PassingError, Settings, StatusError
from ..http_messages import may_pass
from ..rollouts import Rollouts
from ..server_urls import ServerURL, read_url
from ..signals import TokenLogProbs
from .answer_arrays import Row, TokenScores
from .base import Teacher
from .server_answers import ErrorInsideError, read_answer, read_models


logger = logging.getLogger(__name__)


T = TypeVar("T")


ADVICE = {  # what to change, by a part of the server's error message
    "max allowed": "Start the server with `--max-logprobs` of at least `top_k` (the run's `kl_top_k`), or lower it.",
    "maximum context length": "Start the server with a larger `--max-model-len`, or shorten prompts and completions.",
    "not JSON compliant": "The teacher computes NaN: look at its weights and at the server's `--dtype`.",
}


class ServedTeacher(Teacher):
    """
    A teacher on one or several vLLM servers, which must serve the same weights.

    Every training process sends its own rollouts. A request that fails for a transient reason (no connection, a
    timeout, HTTP 408, 409, 425, 429 or 5xx, also as an error inside an answer with HTTP 200) is sent again, to another
    URL if there is one: without a pause until all URLs have been tried once, then with exponentially growing pauses.

    Args:
        urls (`str` or `list[str]`): URLs of the servers, with or without `/v1`. A login in a URL
            (`http://user:password@host`) is sent, but never shown.
        model (`str`): the first name under which they serve it.
        top_k (`int`): number of the teacher's most likely ids to request besides the sampled token. The server's
            `--max-logprobs` (20 by default) must allow it.
        timeout (`float`): seconds without data from the server after which a request has failed; waiting in the
            server's queue counts.
        retries (`int`): further attempts after a failed request.
        backoff (`float`): approximate length of the first pause in seconds; each further pause is twice as long, up
            to 30 seconds.
        concurrency (`int`): number of requests at the same time.
        rows_per_request (`int`): sequences in one request.
        api_key (`str`, *optional*): the server's `--api-key`.

    Raises:
        ValueError: a number is out of range, or a URL cannot be used.
    """

    gives = TokenLogProbs
    per_generation = True  # large requests keep the servers busy, and training waits once per generation batch
    temperature = 1.0  # of vLLM's `prompt_logprobs`
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
        Score the tokens that `rollouts.mask` marks; rows without any are not sent.

        Raises:
            TeacherUnavailable: there was no answer within the timeouts and retries.
            TeacherAnswerError: the server rejected the request, or its answer does not match it.
            ValueError: the mask marks padding, or the first token of a row.
        """
        rows, size = _rows(rollouts), self.rows_per_request
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = self._client.all([partial(self._score_rows, batch) for batch in batches])
        scores, device = TokenScores.cat(answers, self.top_k), rollouts.input_ids.device
        return TokenLogProbs(
            log_p=torch.from_numpy(scores.log_p).to(device, torch.float32),  # (N,)
            top_ids=torch.from_numpy(scores.top_ids).to(device),  # (N, K)
            top_log_p=torch.from_numpy(scores.top_log_p).to(device, torch.float32),  # (N, K)
        )

    def check(self) -> None:
        """
        Request the models and the scores of two short sequences from every server; called before training.

        Raises:
            TeacherUnavailable: no server answers. If only some do not, a warning is logged.
            TeacherAnswerError: a server cannot give what `score` needs.
            ValueError: a server does not serve `model`.
        """
        failures = [
            failure for failure in self._client.all([partial(self._visit, url) for url in self.urls]) if failure
        ]
        if len(failures) == len(self.urls):
            raise TeacherUnavailable(" ".join(map(str, failures)))
        for failure in failures:
            logger.warning("Training continues without one of the teacher's servers. %s", failure)

    def close(self) -> None:
        """Close the connections; the teacher cannot be used afterwards."""
        self._client.close()

    def _score_rows(self, rows: list[Row], halt: threading.Event, urls: list[str] | None = None) -> TokenScores:
        body = {
            "model": self.model,
            "prompt": [row.ids for row in rows],
            "prompt_logprobs": max(self.top_k, 1),  # with 0, vLLM would skip its check that fast prefill is off
            "return_token_ids": True,
            "add_special_tokens": False,
            "temperature": 1.0,
            "max_tokens": 1,  # vLLM's minimum
        }
        read = partial(read_answer, rows=rows, model=self.model, top_k=self.top_k)
        return self._ask(urls or self._next_urls(), "/completions", body, read, halt)

    def _visit(self, url: str, halt: threading.Event) -> TeacherUnavailable | None:
        """Check one server; returns the error if it does not answer."""
        try:
            models = self._ask([url], "/models", None, read_models, halt)
            if self.model not in models:
                raise ValueError(
                    f"{url} does not serve `model='{self.model}'` but {models}. Pass one of these names, or start the "
                    f"server with `--served-model-name {self.model}`."
                )
            self._score_rows([Row(0, [0, 1], []), Row(1, [1, 0], [])], halt, [url])
        except TeacherUnavailable as error:
            return error
        return None

    def _next_urls(self) -> list[str]:
        """All URLs, beginning with another one each time."""
        start = next(self._turn) % len(self.urls)
        return self.urls[start:] + self.urls[:start]

    def _ask(
        self, urls: list[str], path: str, body: dict[str, Any] | None, read: Callable[[bytes], T], halt: threading.Event
    ) -> T:
        """Send a request and parse the answer with `read`; the client's errors are raised as the teacher's."""

        def parsed(url: str, content: bytes) -> T:
            try:
                return read(content)
            except ErrorInsideError as error:
                said = f"The answer of {url} cannot be used: {error}"
                if error.status is None:  # another attempt shows whether it passes
                    raise _UnknownError(said.rstrip(".")) from None
                if may_pass(error.status):
                    raise PassingError(said.rstrip(".")) from None
                raise StatusError(said, error.status) from None
            except TeacherAnswerError as error:
                raise TeacherAnswerError(f"The answer of {url} cannot be used: {error}") from None

        try:
            return self._client.ask(urls, path, body, parsed, halt)
        except NoAnswerError as error:
            if isinstance(error.__cause__, _UnknownError):
                raise TeacherAnswerError(_with_advice(str(error))) from error
            raise TeacherUnavailable(str(error)) from error
        except StatusError as error:
            raise TeacherAnswerError(_with_advice(str(error))) from error


class _UnknownError(PassingError):
    """An answer with HTTP 200 holds an error that names no status."""


def _with_advice(message: str) -> str:
    """A server's message, and what to change."""
    return " ".join([message, *(text for sign, text in ADVICE.items() if sign in message)])


def _rows(rollouts: Rollouts) -> list[Row]:
    """The rows that have judged tokens, without padding."""
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
                f"Row {index}: its first token is judged, but a teacher cannot score a token with nothing before it. "
                "Give every prompt at least one token."
            )
        rows.append(Row(index, rollouts.input_ids[index][kept].tolist(), positions))
    return rows


def _server(url: str) -> ServerURL:
    """A server's URL, ending with `/v1`."""
    server = read_url(url, "`urls`")
    return replace(server, base=server.base.removesuffix("/v1") + "/v1")

"""A teacher behind vLLM's HTTP server: log-probabilities of the sampled tokens, and the teacher's own top k.

    vllm serve Qwen/Qwen3-8B --max-logprobs 64

The protocol is that of vLLM 0.33, unchanged since 0.22: `/v1/completions`, `prompt_logprobs` and `return_token_ids`.
An answer is taken only if every position in it fits what was asked; anything else is an error, never a number. When to
ask is left to the caller, what is computed from the signal to `heads.py`.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import httpx2 as httpx
import torch
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
)

from ..errors import TeacherAnswerError, TeacherUnavailable
from ..http_client import LONGEST_CONNECT, LONGEST_PAUSE, PassingError, retry_after, server_message
from ..rollouts import Rollouts
from ..signals import TokenLogProbs
from .server_answers import Row, TokenScore, read_answer, read_models


logger = logging.getLogger(__name__)


T = TypeVar("T")


FAILED_RECENTLY_SECONDS = 30.0  # seconds during which a URL that failed comes after the others


ADVICE = {  # what to do about a server's complaint
    "HTTP 401": "Pass the server's key as `api_key`.",
    "max allowed": "Start the server with `--max-logprobs` of at least `top_k` (the run's `kl_top_k`), or lower it.",
    "maximum context length": "Start the server with a larger `--max-model-len`, or shorten prompts and completions.",
    "not JSON compliant": "The teacher computes NaN: look at its weights and at the server's `--dtype`.",
}


class ServedTeacher:
    """
    A teacher that one or several vLLM servers run. They must serve the same weights.

    Every training process asks for its own rollouts. A request that fails for a passing reason (no connection, a
    time-out, HTTP 408, 429 or 5xx) is sent again, to another URL if there is one, without a pause until all have been
    tried once and with exponentially growing ones from then on.

    Args:
        urls (`str` or `list[str]`): where the servers listen, with or without `/v1`.
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
        self.urls = list(dict.fromkeys(map(_base_url, [urls] if isinstance(urls, str) else urls)))
        if not self.urls:
            raise ValueError("`urls` is empty. Name at least one server, such as 'http://localhost:8000'.")
        self.model = model
        self.top_k = top_k
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.concurrency = concurrency
        self.rows_per_request = rows_per_request
        self._turn = itertools.count()
        self._failed: dict[str, float] = {}  # URL: when it failed last, by time.monotonic()
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, LONGEST_CONNECT)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

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
        answers = self._all([partial(self._judge, batch) for batch in batches])
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
        failures = [failure for failure in self._all([partial(self._visit, url) for url in self.urls]) if failure]
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
        return self._ask(urls or self._order(), "/completions", body, read, halt)

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

    def _order(self) -> list[str]:
        """All URLs, each in turn first, those that failed lately last."""
        start, now = next(self._turn) % len(self.urls), time.monotonic()
        urls = self.urls[start:] + self.urls[:start]
        return sorted(urls, key=lambda url: now - self._failed.get(url, -math.inf) < FAILED_RECENTLY_SECONDS)

    def _all(self, calls: list[Callable[[threading.Event], T]]) -> list[T]:
        """The results of all calls, made in threads. The first error ends the waiting of the others and is raised."""
        halt = threading.Event()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher") as pool:
            futures = [pool.submit(call, halt) for call in calls]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                halt.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]

    def _ask(
        self, urls: list[str], path: str, body: dict[str, Any] | None, read: Callable[[bytes], T], halt: threading.Event
    ) -> T:
        """One question, put to one URL after the other until an answer comes, and what `read` makes of that."""
        start, turn = time.monotonic(), itertools.cycle(urls)

        def attempt() -> T:
            url = next(turn)
            if halt.is_set():
                raise PassingError(f"{url}: given up, because another request failed")
            try:
                content = self._send(url + path, body)
            except PassingError:
                self._failed[url] = time.monotonic()
                raise
            self._failed.pop(url, None)
            try:
                return read(content)
            except TeacherAnswerError as error:
                raise TeacherAnswerError(f"The answer of {url}{path} cannot be used: {error}") from None

        def pause(state: RetryCallState) -> float:
            if state.attempt_number < len(urls):
                return 0.0  # somebody else has not been asked yet
            longest = self.backoff * 2.0 ** min(state.attempt_number - len(urls), 99)
            error: Any = state.outcome and state.outcome.exception()
            return min(max(longest * random.uniform(0.5, 1.0), error.retry_after), LONGEST_PAUSE)

        def say(state: RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            logger.warning(f"{error}. Attempt {state.attempt_number + 1} of {self.retries + 1} follows.")

        attempts = Retrying(
            stop=stop_after_attempt(self.retries + 1) | stop_when_event_set(halt),
            retry=retry_if_exception_type(PassingError),
            wait=pause,
            sleep=sleep_using_event(halt),
            before_sleep=say,
            reraise=True,
        )
        try:
            return attempts(attempt)
        except PassingError as error:
            raise TeacherUnavailable(
                f"No answer from the teacher at {', '.join(urls)}, tried {attempts.statistics['attempt_number']} times "
                f"in {time.monotonic() - start:.1f} s. The last error: {error}. See whether the server still runs "
                f"there and what its log says; a busy one needs a longer `timeout` (now {self.timeout:g} s), a smaller "
                f"`concurrency` or more `retries` (now {self.retries})."
            ) from error

    def _send(self, url: str, body: dict[str, Any] | None) -> bytes:
        try:
            response = self._client.request("GET" if body is None else "POST", url, json=body)
        except httpx.TransportError as error:
            raise PassingError(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        except httpx.DecodingError as error:
            raise TeacherAnswerError(f"The answer of {url} cannot be decoded: {error}.") from error
        status = response.status_code
        if status == 200:
            return response.content
        refusal = f"{url} answered HTTP {status}: {server_message(response.content)}"
        if status in (408, 429) or status >= 500:
            raise PassingError(refusal, retry_after(response.headers.get("Retry-After")))
        advice = [text for sign, text in ADVICE.items() if sign in refusal]
        raise TeacherAnswerError(" ".join([f"{refusal.rstrip('.')}.", *advice]))


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


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")) or not httpx.URL(url).host:
        raise ValueError(f"`urls` holds {url!r}; write it in full, such as 'http://localhost:8000'.")
    return url.rstrip("/").removesuffix("/v1") + "/v1"

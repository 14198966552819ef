"""Models behind an OpenAI-compatible HTTP endpoint: completions from a teacher, a verdict from a judge.

Failures that may pass are tried again; a refusal that concerns one prompt becomes a `Refusal`, one that concerns all of
them an error. What is asked and what becomes of the answers is left to the caller.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2 as httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt

from ...errors import TeacherAnswerError, TeacherUnavailable
from ...http_client import LONGEST_CONNECT, LONGEST_PAUSE, PassingError, retry_after, server_message
from ..address import Address
from ..records import Answer, Completion, Refusal
from ..text import Text
from .base import Sampling


if TYPE_CHECKING:
    from ..config import GenerateConfig


logger = logging.getLogger(__name__)


T = TypeVar("T")


PROMPT_IS_AT_FAULT = (400, 413, 422)  # statuses; 401, 403, 404 and the like concern every prompt


class RefusedError(Exception):
    """The endpoint does not want this request; others may be answered."""


class Endpoint:
    """
    One model at one URL.

    Args:
        address (`Address`): a URL without a path gets `/v1`.
        api_key (`str`, *optional*): sent as a bearer token.
        concurrency (`int`): requests under way at once.
        timeout (`float`): seconds without a byte after which a request has failed.
        retries (`int`): further attempts after a failed one.
        backoff (`float`): seconds of the first pause, about; doubled from each to the next, at most 30.
    """

    def __init__(
        self,
        address: Address,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
    ):
        self.model, self.concurrency, self.retries, self.backoff = address.model, concurrency, retries, backoff
        self.url = address.url if httpx.URL(address.url).path not in ("", "/") else f"{address.url}/v1"
        self._halt = threading.Event()
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, LONGEST_CONNECT)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    @classmethod
    def from_config(cls, address: Address, config: GenerateConfig) -> Endpoint:
        key = os.environ.get(config.api_key_env)
        return cls(address, key, config.concurrency, config.timeout, config.retries)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """
        The parsed answer to one request.

        Raises:
            RefusedError: this request is refused.
            TeacherAnswerError: all requests would be, or the answer is no JSON object.
            TeacherUnavailable: no answer after all attempts.
        """

        def say(state: RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            logger.warning(f"{error}. Attempt {state.attempt_number + 1} of {self.retries + 1} follows.")

        attempts = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            retry=retry_if_exception_type(PassingError),
            wait=self._pause,
            sleep=sleep_using_event(self._halt),
            before_sleep=say,
            reraise=True,
        )
        try:
            return attempts(self._send, f"{self.url}{path}", {"model": self.model, **body})
        except PassingError as error:
            raise TeacherUnavailable(
                f"No answer from {self.url}, tried {attempts.statistics['attempt_number']} times. The last error: "
                f"{error}. See whether the server still runs there. All that is finished is kept: start the same "
                "command again to go on."
            ) from error

    def all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all calls, made in threads. After the first error no further call begins, and it is raised."""
        self._halt.clear()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint") as pool:
            futures = [pool.submit(call) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._halt.set()  # ends pauses
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.close()

    def _pause(self, state: RetryCallState) -> float:
        error: Any = state.outcome and state.outcome.exception()
        longest = self.backoff * 2.0 ** min(state.attempt_number - 1, 99)
        return min(max(longest * random.uniform(0.5, 1.0), error.retry_after), LONGEST_PAUSE)

    def _send(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._halt.is_set():
            raise TeacherUnavailable(f"{url}: given up, because another request failed")
        try:
            response = self._client.post(url, json=body)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise PassingError(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        status = response.status_code
        if status == 200:
            return _parsed(url, response.content)
        refusal = f"{url} answered HTTP {status}: {server_message(response.content)}".rstrip(".")
        if status in (408, 409, 425, 429) or status >= 500:
            raise PassingError(refusal, retry_after(response.headers.get("Retry-After")))
        if status in PROMPT_IS_AT_FAULT:
            raise RefusedError(refusal)
        advice = " Put the key into the environment variable that `api_key_env` names." if status == 401 else ""
        raise TeacherAnswerError(f"{refusal}. Every request would be answered like this.{advice}")


class EndpointSource:
    """
    A teacher behind an endpoint: `/chat/completions` for messages, `/completions` for text.

    Args:
        endpoint (`Endpoint`): where.
        sampling (`Sampling`): how to sample. Each request has a seed of its own; whether it has an effect is up to
            the server.
        options (`dict`, *optional*): merged into each request; a key with `None` is taken out.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, options: dict[str, Any] | None = None):
        self.endpoint, self.sampling, self.options = endpoint, sampling, options or {}
        self._answered = False

    def complete(self, prompts: list[Text], seed: int) -> list[Answer]:
        calls = [partial(self._one, prompt, seed + i) for i, prompt in enumerate(prompts)]
        answers: list[Answer] = self.endpoint.all(calls)
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if not self._answered and len(refused) == len(answers) > 1:
            raise TeacherAnswerError(
                f"All of the first {len(refused)} prompts were refused, so the settings are at fault and not the "
                f"prompts. {refused[0].detail}. If the server does not know a setting, take it out with "
                "`request_options`, such as '{\"seed\": null}'."
            )
        self._answered = self._answered or len(refused) < len(answers)
        return answers

    def close(self) -> None:
        self.endpoint.close()

    def _one(self, prompt: Text, seed: int) -> Answer:
        found: list[Completion] = []
        while len(found) < self.sampling.n:  # some servers give one completion whatever `n` is
            body = self._body(prompt, self.sampling.n - len(found), seed + 7919 * len(found))
            path = "/completions" if isinstance(prompt, str) else "/chat/completions"
            try:
                answer = self.endpoint.ask(path, body)
            except RefusedError as error:
                return Refusal("refused by the endpoint", str(error))
            found += _completions(answer, self.endpoint.url)
        return found[: self.sampling.n]

    def _body(self, prompt: Text, n: int, seed: int) -> dict[str, Any]:
        s = self.sampling
        body: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt, "n": n, "seed": seed}
        body |= {"max_tokens": s.max_tokens, "temperature": s.temperature, "top_p": s.top_p, **self.options}
        return {key: value for key, value in body.items() if value is not None}


def _completions(answer: dict[str, Any], url: str) -> list[Completion]:
    """The completions in an answer, at least one."""
    try:
        texts = [
            choice["text"] if "text" in choice else choice["message"].get("content") or ""
            for choice in answer["choices"]
        ]
        found = [
            Completion(text.encode(errors="replace").decode(), str(choice.get("finish_reason") or "length"))
            for text, choice in zip(texts, answer["choices"], strict=True)
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise TeacherAnswerError(
            f"{url} gave an answer without `choices` that hold text ({type(error).__name__} {error}): "
            f"{json.dumps(answer)[:300]}"
        ) from None
    if not found:
        raise TeacherAnswerError(f"{url} gave an answer with no choice in it: {json.dumps(answer)[:300]}")
    return found


def _parsed(url: str, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise PassingError(f"{url} answered with something that is no JSON: {content[:100]!r}") from None
    if not isinstance(answer, dict):
        raise TeacherAnswerError(f"{url} answered with no JSON object: {content[:300]!r}")
    return answer

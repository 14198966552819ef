"""Models behind an OpenAI-compatible HTTP endpoint: completions from a teacher, a verdict from a judge.

Failures that may pass are tried again; a refusal that concerns one prompt becomes a `Refusal`, one that concerns all of
them an error. What is asked and what becomes of the answers is left to the caller.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2 as httpx

from ...errors import TeacherAnswerError, TeacherUnavailable
from ...http_client import HTTPClient, NoAnswerError, PassingError, Settings, StatusError, read_url
from ..address import Address
from ..records import Answer, Completion, Refusal
from ..text import Text
from .base import Sampling


if TYPE_CHECKING:
    from ..config import GenerateConfig


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
        self.model = address.model
        server = read_url(address.url, "The address of an endpoint")
        self.url = server.base if httpx.URL(server.base).path not in ("", "/") else f"{server.base}/v1"
        settings = Settings(
            timeout,
            retries,
            backoff,
            concurrency,
            who="the endpoint",
            names={name: f"`--{name}`" for name in ("timeout", "retries", "concurrency")},
            key_advice="Put the key into the environment variable that `api_key_env` names.",
            last_words="All that is finished is kept: start the same command again to go on.",
        )
        self._client = HTTPClient(settings, [replace(server, base=self.url)], api_key)

    @classmethod
    def from_config(cls, address: Address, config: GenerateConfig) -> Endpoint:
        key = os.environ.get(config.api_key_env)
        return cls(address, key, config.concurrency, config.timeout, config.retries)

    def ask(self, path: str, body: dict[str, Any], halt: threading.Event) -> dict[str, Any]:
        """
        The parsed answer to one request.

        Args:
            path (`str`): appended to the URL.
            body (`dict`): of the request, without the model.
            halt (`threading.Event`): ends pauses and further attempts; given by [`all`].

        Raises:
            RefusedError: this request is refused.
            TeacherAnswerError: all requests would be, or the answer is not a JSON object.
            TeacherUnavailable: no answer after all attempts.
        """
        try:
            return self._client.ask([self.url], path, {"model": self.model, **body}, _parsed, halt)
        except NoAnswerError as error:
            raise TeacherUnavailable(str(error)) from error
        except StatusError as error:
            if error.status in PROMPT_IS_AT_FAULT:
                raise RefusedError(str(error)) from error
            raise TeacherAnswerError(f"{error} Every request would be answered like this.") from error

    def all(self, calls: Sequence[Callable[[threading.Event], T]]) -> list[T]:
        """The results of all calls, made in threads; see [`HTTPClient.all`]."""
        return self._client.all(calls)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


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
                f"prompts. {refused[0].detail} If the server does not know a setting, take it out with "
                "`request_options`, such as '{\"seed\": null}'."
            )
        self._answered = self._answered or len(refused) < len(answers)
        return answers

    def close(self) -> None:
        self.endpoint.close()

    def _one(self, prompt: Text, seed: int, halt: threading.Event) -> Answer:
        found: list[Completion] = []
        while len(found) < self.sampling.n:  # some servers give one completion whatever `n` is
            body = self._body(prompt, self.sampling.n - len(found), seed + 7919 * len(found))
            path = "/completions" if isinstance(prompt, str) else "/chat/completions"
            try:
                answer = self.endpoint.ask(path, body, halt)
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
        raise PassingError(f"{url} answered with something that is not JSON: {content[:100]!r}") from None
    if not isinstance(answer, dict):
        raise TeacherAnswerError(f"{url} answered with something that is not a JSON object: {content[:300]!r}")
    return answer

"""Models behind an OpenAI-compatible HTTP endpoint: completions from a teacher, a verdict from a judge.

Failures that may pass are tried again; a refusal that concerns one prompt becomes a `Refusal`, one that concerns all of
them an error. What is asked and what becomes of the answers is left to the caller.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2 as httpx

from ...errors import TeacherAnswerError, TeacherUnavailable
from ...http_client import HTTPClient, NoAnswerError, Settings, StatusError
from ...redaction import from_environment, redacted
from ...server_urls import ServerURL, read_url
from ..address import Address
from ..images import as_openai
from ..records import Answer, Completion, Refusal
from ..text import Text
from .answers import ErrorInsideError, UnusableError, read_completions
from .base import AllRefusedError, Sampling, Seeds, seeds_of


if TYPE_CHECKING:
    from ..config import GenerateConfig


T = TypeVar("T")


PROMPT_IS_AT_FAULT = (400, 413, 422)  # statuses; 401, 403, 404 and the like concern every prompt


MANY = 8  # answers without a completion that cannot be chance if there is no other


class RefusedError(Exception):
    """The endpoint does not answer this request; others may be answered."""

    kind = "refused by"  # the beginning of what is counted


class UnusableAnswerError(RefusedError):
    """The endpoint answered again and again, and there was never a completion in it."""

    kind = "unusable answer of"


class Endpoint:
    """
    One model at one URL, or at several that serve it. A request goes to the one with the fewest under way, and one that
    failed lately is left out for a while; seeds do not depend on which is asked.

    Args:
        address (`Address`): a URL without a path gets `/v1`.
        api_key (`str`, *optional*): sent as a bearer token.
        concurrency (`int`): requests under way at once, at each URL.
        timeout (`float`): seconds without a byte after which a request has failed.
        retries (`int`): further attempts after a failed one.
        backoff (`float`): seconds of the first pause, about; doubled from each to the next, at most 30.
        secrets (`Sequence[str]`, *optional*): keys in the bodies of requests, which no message may show.

    Raises:
        ValueError: the URL or the key cannot be used.
    """

    def __init__(
        self,
        address: Address,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
        secrets: Sequence[str] = (),
    ):
        self.model = address.model
        servers = [_with_path(read_url(url, "The address of an endpoint")) for url in address.urls]
        self.urls = [server.base for server in servers]
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
        self._make = partial(HTTPClient, settings, servers, api_key, secrets, balanced=True)
        self._open: HTTPClient | None = self._make()
        self._lock = threading.Lock()

    @property
    def _client(self) -> HTTPClient:
        """The connections, opened again after they were closed."""
        with self._lock:
            self._open = self._open or self._make()
            return self._open

    @property
    def url(self) -> str:
        """The first URL."""
        return self.urls[0]

    @classmethod
    def from_config(cls, address: Address, config: GenerateConfig, secrets: Sequence[str] = ()) -> Endpoint:
        key = os.environ.get(config.api_key_env)
        if key is None and config.api_key_env != type(config).api_key_env:  # not shown: it may be the key
            raise ValueError(
                "The environment variable that `api_key_env` names is not set. Put the endpoint's key into it, or "
                "leave `api_key_env` out."
            )
        return cls(address, key, config.concurrency, config.timeout, config.retries, secrets=secrets)

    def ask(self, path: str, body: dict[str, Any], halt: threading.Event) -> list[Completion]:
        """
        The completions in the answer to one request, at least one.

        Args:
            path (`str`): appended to the URL.
            body (`dict`): of the request, without the model.
            halt (`threading.Event`): ends pauses and further attempts; given by [`all`].

        Raises:
            RefusedError: this request is refused, or its answers have no completion in them, after all attempts.
            TeacherAnswerError: all requests would be refused.
            TeacherUnavailable: no answer after all attempts.
        """
        try:
            return self._client.ask(self.urls, path, {"model": self.model, **body}, read_completions, halt)
        except NoAnswerError as error:
            if isinstance(error.__cause__, UnusableError):
                raise UnusableAnswerError(str(error.__cause__)) from error
            raise TeacherUnavailable(str(error)) from error
        except StatusError as error:
            if error.status in PROMPT_IS_AT_FAULT:
                raise RefusedError(str(error)) from error
            if isinstance(error, ErrorInsideError):
                raise UnusableAnswerError(str(error)) from error
            raise TeacherAnswerError(f"{error} Every request would be answered like this.") from error

    def all(self, calls: Sequence[Callable[[threading.Event], T]]) -> list[T]:
        """The results of all calls, made in threads; see [`HTTPClient.all`]."""
        return self._client.all(calls)

    def close(self) -> None:
        """Close the connections; a later request opens others."""
        with self._lock:
            opened, self._open = self._open, None
        if opened is not None:
            opened.close()


def _with_path(server: ServerURL) -> ServerURL:
    """A URL without a path gets `/v1`."""
    return server if httpx.URL(server.base).path not in ("", "/") else replace(server, base=f"{server.base}/v1")


class EndpointSource:
    """
    A teacher behind an endpoint: `/chat/completions` for messages, `/completions` for text.

    Args:
        endpoint (`Endpoint`): where.
        sampling (`Sampling`): how to sample. Each request has a seed of its own; whether it has an effect is up to
            the server.
        options (`dict`, *optional*): merged into each request; a key with `None` is taken out.
        keep_reasoning (`str`, *optional*, defaults to `"no"`): what becomes of reasoning beside the text: "no", "think"
            or "column".
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sampling: Sampling,
        options: dict[str, Any] | None = None,
        keep_reasoning: str = "no",
    ):
        self.endpoint, self.sampling, self.options = endpoint, sampling, options or {}
        self.keep_reasoning = keep_reasoning
        self._answered = False

    @classmethod
    def from_config(cls, address: Address, sampling: Sampling, config: GenerateConfig) -> EndpointSource:
        assert not isinstance(config.request_options, str)
        options = _with_keys(config.request_options or {})
        endpoint = Endpoint.from_config(address, config, list(_secrets(options, redacted(options))))
        return cls(endpoint, sampling, options, config.keep_reasoning)

    def complete(self, prompts: list[Text], seed: Seeds) -> list[Answer]:
        calls = [partial(self._one, *each) for each in zip(prompts, seeds_of(seed, len(prompts)), strict=True)]
        answers: list[Answer] = self.endpoint.all(calls)
        check_some_usable(answers, "the endpoint")
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if not self._answered and len(refused) == len(answers) > 1:
            raise AllRefusedError(
                f"All of the first {len(refused)} prompts were refused, so the settings are at fault and not the "
                f"prompts. {refused[0].detail} If the server does not know a setting, take it out with "
                "`request_options`, such as '{\"seed\": null}'.",
                answers,
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
                found += self.endpoint.ask(path, body, halt)
            except RefusedError as error:
                return Refusal(f"{error.kind} the endpoint", str(error))
        return [with_reasoning(completion, self.keep_reasoning) for completion in found[: self.sampling.n]]

    def _body(self, prompt: Text, n: int, seed: int) -> dict[str, Any]:
        s = self.sampling
        name = "prompt" if isinstance(prompt, str) else "messages"
        body: dict[str, Any] = {name: as_openai(prompt), "n": n, "seed": seed}
        body |= {"max_tokens": s.max_tokens, "temperature": s.temperature, "top_p": s.top_p, **self.options}
        return {key: value for key, value in body.items() if value is not None}


def with_reasoning(completion: Completion, kept: str) -> Completion:
    """
    A completion with its reasoning as it is kept: not at all ("no"), in front of the text ("think"), or beside it
    ("column"). An answer without text stays without: it is dropped as empty.
    """
    if kept == "column":
        return completion
    text, reasoning = completion.text, completion.reasoning
    if kept == "think" and reasoning and text:
        text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"
    return Completion(text, completion.stop_reason)


def check_some_usable(answers: Sequence[Any], who: str) -> None:
    """
    That a server which gives nothing but answers without a completion is not taken for one with odd prompts.

    Raises:
        TeacherUnavailable: there are many answers, and none can be used.
    """
    unusable = [answer for answer in answers if isinstance(answer, Refusal) and answer.kind.startswith("unusable")]
    if len(unusable) == len(answers) >= MANY:
        raise TeacherUnavailable(
            f"None of {len(answers)} answers of {who} in a row can be used, so the server is at fault and not the "
            f"prompts. {unusable[0].detail} See what its log says. All that is finished is kept: start the same "
            "command again to go on."
        )


def _with_keys(value: Any, name: str = "") -> Any:
    """Request options in which keys that are written as `$NAME` come from the environment."""
    if isinstance(value, dict):
        return {key: _with_keys(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_keys(inner, name) for inner in value]
    is_key = redacted("any text", name) != "any text"
    return from_environment(value, "request_options") if is_key else value


def _secrets(value: Any, shown: Any) -> Iterator[str]:
    """The secrets in a value, given what of it may be shown."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _secrets(inner, shown[name])
    elif isinstance(value, list):
        for inner, part in zip(value, shown, strict=True):
            yield from _secrets(inner, part)
    elif isinstance(value, str) and value != shown:
        yield from (value, *(word for word in value.split() if len(word) > 7))  # "Bearer" and the key after it

"""Where a model is to be found: a name for transformers, one for vLLM in this process, or an HTTP endpoint.

Only the form is checked. Loading and asking are left to `sources/`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..server_urls import read_url, without_login


@dataclass(frozen=True)
class Address:
    """
    Attributes:
        kind (`str`): "transformers", "vllm" or "endpoint".
        model (`str`): name or folder, or the name that the endpoint serves.
        url (`str`): of the endpoint, without a slash at the end; empty for the others. It may hold a login.
        more_urls (`tuple[str, ...]`): of further endpoints that serve the same model.
    """

    kind: str
    model: str
    url: str = field(default="", repr=False)
    more_urls: tuple[str, ...] = field(default=(), repr=False)

    @property
    def urls(self) -> list[str]:
        """All endpoints; none for a model in this process."""
        return [self.url, *self.more_urls] if self.url else []

    @property
    def short_name(self) -> str:
        """What rows are marked with: a folder's last part, or the model's name."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


def parse_address(text: str | Sequence[str]) -> Address:
    """
    Read `name`, `vllm:name` or `http://host:port/v1#model`; of the last kind several, as a list or with commas between.

    Raises:
        ValueError: the model of an endpoint is not named, its URL cannot be used, several endpoints do not serve one
            model, or nothing is named.
    """
    parts = re.split(r"\s*,\s*(?=https?://)", text) if isinstance(text, str) else list(text)
    if len(parts) != 1:
        return _several(parts)
    text = str(parts[0])
    if text.startswith("vllm:"):
        return Address("vllm", text.removeprefix("vllm:"))
    if "://" in text:
        url, _, model = text.partition("#")
        if "#" in model:
            raise ValueError(
                "The address of an endpoint holds more than one `#`, which begins the model's name. Write one that "
                "belongs to a password as %23."
            )
        if not model:
            shown = without_login(text)
            raise ValueError(
                f"{shown!r} does not say which model to ask for. Append it as the endpoint's `/v1/models` lists it: "
                f"`{shown}#name`."
            )
        read_url(url, "The address of an endpoint")
        return Address("endpoint", model, url.rstrip("/"))
    if not text.strip():
        raise ValueError("A model has an empty name. Write a folder, a hub name, `vllm:name` or `http://...#name`.")
    return Address("transformers", text)


def _several(parts: list[str]) -> Address:
    """The address of one model at several endpoints."""
    found = [parse_address(str(part)) for part in parts]
    if not found or any(address.kind != "endpoint" for address in found):
        raise ValueError(
            "A list of addresses names the endpoints of one teacher, but one of them is no endpoint, or the list is "
            'empty. Write each as `http://host:port/v1#model`; different teachers get names: `{"a": ..., "b": ...}`.'
        )
    models = list(dict.fromkeys(address.model for address in found))
    if len(models) > 1:
        raise ValueError(
            f"The endpoints of one teacher serve different models: {', '.join(map(repr, models))}. An answer must not "
            "depend on which of them is asked: serve one model under one name, or make them teachers of their own."
        )
    urls = list(dict.fromkeys(address.url for address in found))
    return Address("endpoint", models[0], urls[0], tuple(urls[1:]))

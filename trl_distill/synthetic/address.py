"""Where a model is to be found: a name for transformers, one for vLLM in this process, or an HTTP endpoint.

Only the form is checked. Loading and asking are left to `sources/`.
"""

from __future__ import annotations

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
    """

    kind: str
    model: str
    url: str = field(default="", repr=False)

    @property
    def short_name(self) -> str:
        """What rows are marked with: a folder's last part, or the model's name."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


def parse_address(text: str) -> Address:
    """
    Read `name`, `vllm:name` or `http://host:port/v1#model`.

    Raises:
        ValueError: the model of an endpoint is not named, its URL cannot be used, or nothing is named.
    """
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

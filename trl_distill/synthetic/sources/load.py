"""Sources by their address."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from transformers import AutoConfig

from ..address import Address
from .base import Sampling, Source
from .local import TransformersSource, VLLMSource


if TYPE_CHECKING:
    from ..config import GenerateConfig


def check_source(address: Address) -> None:
    """
    Find out early, without loading weights, whether a teacher is there; an endpoint shows with the first request.

    Raises:
        ValueError: it is not.
    """
    if address.kind == "transformers":
        try:
            AutoConfig.from_pretrained(address.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The teacher {address.model!r} could not be found: {error} Name a folder with model and tokenizer, or "
                "a model on the hub."
            ) from None
    elif address.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"The teacher 'vllm:{address.model}' needs vLLM. Install it with `pip install 'trl_distill[vllm]'`, or "
            "leave out `vllm:` to use transformers."
        )


def load_source(address: Address, sampling: Sampling, config: GenerateConfig) -> Source:
    """The source at an address."""
    template = config.chat_template_kwargs
    assert not isinstance(template, str)
    if address.kind == "vllm":
        return VLLMSource(address.model, sampling, template)
    if address.kind == "endpoint":
        from .endpoint import EndpointSource

        return EndpointSource.from_config(address, sampling, config)
    return TransformersSource(address.model, sampling, config.batch_size, template)

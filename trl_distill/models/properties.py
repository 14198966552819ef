"""What is read off a model or its configuration: name, stop ids, context, positions, the model under an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def has_relative_positions(config: Any) -> bool:
    """Whether a model is indifferent to padding on the left: rotary embeddings, by its configuration."""
    return getattr(config.get_text_config(), "rope_parameters", None) is not None


def unwrap_adapter(model: Any) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def stop_ids(
    model_config: Any, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> set[int]:
    """Every id that ends a turn of a model, by its generation settings, else its configuration, and its tokenizer."""

    def ids_of(source: Any) -> set[Any]:
        ids = getattr(source, "eos_token_id", None)
        return (set(ids) if isinstance(ids, Iterable) else {ids}) - {None}

    found = ids_of(generation) or ids_of(model_config)
    return found if tokenizer is None else real_stops(found, tokenizer) | ids_of(tokenizer)


def real_stops(ids: set[int], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Those that are special or added tokens: configurations have defaults that mean nothing to the tokenizer."""
    return ids & (set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values()))


def context_of(config: Any) -> int | None:
    """Positions that a model takes, with those that a scaled RoPE adds; `None` where its configuration is silent."""
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if positions is None or "factor" not in rope:
        return positions
    return max(positions, int(rope.get("original_max_position_embeddings", positions) * rope["factor"]))


def name_of(teacher: Any) -> str:
    """What to call a teacher in a log: a name or folder as it is, a model by where it came from, else its class."""
    if isinstance(teacher, str):
        return teacher
    origin = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    served = getattr(teacher, "model", None)  # of a `ServedTeacher`: the name under which it is served
    return origin or (served if isinstance(served, str) else type(teacher).__name__)

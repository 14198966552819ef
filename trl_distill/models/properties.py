"""Properties of a model and its configuration: name, stop ids, context length, positions, the model in an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


# Rotary, and yet padding on the left changes their results: it enters a state (RecurrentGemma) or compressed blocks
# (DeepSeek V4), attention is scaled by position (BEAM, Llama 4, Ministral 3), or a norm follows the rotation (Hunyuan).
# tests/models/test_families.py finds further ones.
PADDING_COUNTS = {
    "beam",
    "deepseek_v4",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "llama4_text",
    "ministral3",
    "recurrent_gemma",
}


def has_relative_positions(config: Any) -> bool:
    """Whether a model has rotary positions and nothing else that counts tokens, so that padding does not matter."""
    text = config.get_text_config()
    return getattr(text, "rope_parameters", None) is not None and text.model_type not in PADDING_COUNTS


def positions_depend_on_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the length of the whole sequence, padding included."""
    rope: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return bool(kinds & {"dynamic", "longrope"})


def reads_images(config: Any) -> bool:
    """Whether a model, by its configuration, is a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def special_ids(config: Any) -> set[int]:
    """Ids in whose place a vision-language model puts images, or expects them, by its configuration."""
    named = {name: value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    return {value for value in named.values() if isinstance(value, int)} if reads_images(config) else set()


def placeholder_ids(config: Any) -> set[int]:
    """Ids that stand for an image or a video in a prompt; a model that wrote one could not be judged on it."""
    names = [f"{what}_token_{kind}" for what in ("image", "video") for kind in ("id", "index")]
    found = {getattr(config, name, None) for name in names} if reads_images(config) else set()
    return {value for value in found if isinstance(value, int)}


def backbone_of(model: PreTrainedModel) -> Any:
    """The module that computes the hidden states: `base_model`, or what Llama 4 has in its place."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def unwrap_adapter(model: Any) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def stop_ids(
    model_config: Any, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> set[int]:
    """All ids that end a turn: of the generation settings (or else the configuration) and of the tokenizer."""

    def ids_of(source: Any) -> set[Any]:
        ids = getattr(source, "eos_token_id", None)
        return (set(ids) if isinstance(ids, Iterable) else {ids}) - {None}

    found = ids_of(generation) or ids_of(model_config)
    return found if tokenizer is None else real_stops(found, tokenizer) | ids_of(tokenizer)


def real_stops(ids: set[int], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Those ids that are special or added tokens; default ids in a configuration may be ordinary tokens."""
    return ids & (set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values()))


def context_of(config: Any) -> int | None:
    """Context length in tokens, RoPE scaling included; `None` if the configuration does not say."""
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if positions is None or "factor" not in rope:
        return positions
    return max(positions, int(rope.get("original_max_position_embeddings", positions) * rope["factor"]))


def name_of(teacher: Any) -> str:
    """The name of a teacher or model in a log: its name or folder, where it was loaded from, or else its class."""
    if isinstance(teacher, str):
        return teacher
    origin = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    served = getattr(teacher, "model", None)  # a `ServedTeacher` has the name under which it is served
    return origin or (served if isinstance(served, str) else type(teacher).__name__)

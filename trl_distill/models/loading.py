"""Load configurations, models and tokenizers by name; incomplete ones raise an error that says what to change.

What is checked after loading is in `trl_distill.checks`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .properties import reads_images


logger = logging.getLogger(__name__)


def check_folder(name_or_path: str, whose: str, argument: str) -> None:
    """Raise `ValueError` for a path that does not exist; asking the hub for it can take half a minute."""
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1  # on the hub: owner/name
    if is_path and not os.path.exists(name_or_path):
        raise ValueError(f"The {whose}'s folder {name_or_path!r} does not exist. Check {argument}.")


def load_config(name_or_path: str, whose: str, argument: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration, without weights. Raises `ValueError` if the name is wrong or it cannot be read."""
    check_folder(name_or_path, whose, argument)
    try:
        return AutoConfig.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):
            raise ValueError(
                f"The {whose} {name_or_path!r} is an adapter, not a whole model. In Python, pass a `PeftModel`: "
                f"`AutoPeftModelForCausalLM.from_pretrained({name_or_path!r})`. Or save it merged and use that: "
                "`model.merge_and_unload().save_pretrained(...)`."
            ) from None
        if os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise ValueError(f"The {whose}'s `config.json` in {name_or_path!r} cannot be read: {error}") from None
        if name_or_path.startswith((".", "/", "~")):
            raise ValueError(f"The {whose}'s folder {name_or_path!r} has no `config.json`. Check {argument}.") from None
        raise ValueError(
            f"The {whose} {name_or_path!r} could not be found: it is neither a folder with a `config.json` nor a model "
            f"found on the hub. Check {argument}. ({error})"
        ) from error


def load_whole(load: Callable[..., Any], name_or_path: str, whose: str, **kwargs: Any) -> Any:
    """
    A model with all its weights. transformers alone would initialise missing weights at random and only warn.

    Args:
        load (`Callable`): `from_pretrained`, or a function that passes its arguments on to it.
        name_or_path (`str`): hub name or folder.
        whose (`str`): "teacher" or "student", for messages.

    Raises:
        ValueError: the weights cannot be read, or some of them are missing or have another shape.
    """
    try:
        model, info = load(name_or_path, output_loading_info=True, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"The weights of the {whose} {name_or_path!r} could not be loaded. If a download broke off, or the files "
            f"are pointers of git-lfs, fetch them again. ({error})"
        ) from error
    absent = sorted(info["missing_keys"])
    if absent and getattr(model, "is_quantized", False):  # quantisers use other keys
        logger.warning(
            f"transformers did not find {len(absent)} weights of the quantised {whose}, such as {absent[0]!r}. This is "
            "expected with some quantisers; make sure that the model is not random."
        )
    elif absent:
        raise ValueError(
            f"The checkpoint of the {whose} {name_or_path!r} lacks {len(absent)} of its weights ({absent[0]!r} ...): "
            "they would be random. Use a complete checkpoint, or one that matches its `config.json`."
        )
    return model


def load_processor(name_or_path: str, config: PretrainedConfig, **kwargs: Any) -> Any:
    """The processor saved with a vision-language model, or `None` if there is none."""
    if not name_or_path or not reads_images(config):
        return None
    try:
        found: Any = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    return found if isinstance(found, ProcessorMixin) else None


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, or `None` if there is none."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError, TypeError):  # raised by transformers for a folder without a tokenizer
        return None

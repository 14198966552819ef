"""Models, configurations and tokenizers by name: whole, or an error that says what to change.

What is checked of them once they are there is in `checks.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def check_folder(name_or_path: str, whose: str, argument: str) -> None:
    """A wrong path is an error at once: asking the hub for it may take half a minute. Raises `ValueError`."""
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1  # on the hub: owner/name
    if is_path and not os.path.exists(name_or_path):
        raise ValueError(f"The {whose}'s folder {name_or_path!r} does not exist. Check {argument}.")


def load_config(name_or_path: str, whose: str, argument: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration: a cheap way to learn that a path is wrong before any weights are loaded."""
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
    A model of which every weight was found; transformers draws at random what a checkpoint lacks, and goes on.

    Args:
        load (`Callable`): `from_pretrained`, or what hands its arguments on to it.
        name_or_path (`str`): of the model.
        whose (`str`): "teacher", for the message.

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
    if absent and getattr(model, "is_quantized", False):  # quantisers have keys of their own
        logger.warning(f"transformers misses {len(absent)} weights of the quantised {whose}, such as {absent[0]!r}.")
    elif absent:
        raise ValueError(
            f"The checkpoint of the {whose} {name_or_path!r} lacks {len(absent)} of its weights ({absent[0]!r} ...): "
            "they would be random. Use a whole checkpoint, or one that fits its `config.json`."
        )
    return model


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or `None` where there is none."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError, TypeError):  # what transformers raises for a folder without a tokenizer
        return None

"""What `trl-distill report` and `evaluate` share: loading saved models and prompts, and checking that they fit.

Errors end the command with a message that says what to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checks import models as model_checks
from ..checks import tokenizers as tokenizer_checks
from ..data.datasets import load_splits, with_prompts
from ..data.sampling import rollouts_of, scorer_of
from ..models.hidden_states import add_teacher_forward
from ..models.loading import check_folder, load_tokenizer, load_whole
from ..models.properties import stop_ids, unwrap_adapter


console = Console()


def load(name: str, whose: str, dtype: str, device: str) -> Any:
    """A model whose forward gives hidden states, after a check that its logits follow from them."""
    try:
        check_folder(name, whose, "the path")
        model = load_whole(AutoModelForCausalLM.from_pretrained, name, whose, dtype=dtype).to(device).eval()
        model_checks.check_text_only(model.config, whose)
        add_teacher_forward(model)
        probe = rollouts_of([[0]], [[1, 2, 3]], 0, device)
        with torch.no_grad():
            expected = model(input_ids=probe.input_ids).logits[0, :-1]
            states = scorer_of(model)(probe)
            model_checks.check_logits(expected, states.head.logits(states.hidden), whose)
    except (OSError, ValueError) as error:
        raise SystemExit(f"The {whose} {name!r} could not be loaded. ({error})") from None
    return model


def check_teacher(tokenizer: Any, teacher: str, model: Any, student: Any) -> None:
    """Stop where token ids mean something else to the teacher."""
    theirs = load_tokenizer(teacher)
    sizes = [unwrap_adapter(m).config.get_text_config().vocab_size for m in (student, model)]
    for finding in (tokenizer_checks.same_tokenizer(tokenizer, theirs), tokenizer_checks.vocabulary(tokenizer, *sizes)):
        if finding.level == "error":
            raise SystemExit(str(finding))
        if finding.level == "warning":
            console.print(f"[yellow]{finding}[/]")


def first_rows(prompts: str, split: str, most: int) -> list[dict[str, Any]]:
    """The rows that are asked about."""
    splits = load_splits(prompts)
    if split not in splits:
        raise ValueError(
            f"{prompts} has no split {split!r}, only {', '.join(splits)}. Name one of them with `--dataset_split`."
        )
    dataset = with_prompts(splits[split])
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f'{prompts} has the columns {", ".join(dataset.column_names)}, but no "prompt" and no "messages". '
            "Rename the one that holds the questions."
        )
    return list(dataset.select(range(min(most, len(dataset)))))


def ids_unknown_to_teacher(student: Any, teacher: Any) -> tuple[int, ...]:
    """Ids that the student has and the teacher has not: never drawn, as in training."""
    theirs, ours = (unwrap_adapter(m).config.get_text_config().vocab_size for m in (teacher, student))
    return tuple(range(theirs, ours))


def tokenizer_of(model: str) -> Any:
    """A model's tokenizer, with an id for padding."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{model!r} has no tokenizer that could be loaded; save one beside it. ({error})") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def stop_ids_of_all(models: Sequence[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids with which any of the models ends a turn; and those that count as one, since not all have the same."""
    of_each = [stop_ids(model.config, model.generation_config, tokenizer) for model in models]
    stops = sorted(set().union(*of_each))
    return stops, stops if any(ids != of_each[-1] for ids in of_each) else []

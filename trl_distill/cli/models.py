"""What `trl-distill report` and `evaluate` share: loading saved models and prompts, and checking that they fit.

Errors end the command with a message that says what to change.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from .. import foreign_text
from .._trl import create_model_from_path
from ..checks import models as model_checks
from ..checks import tokenizers as tokenizer_checks
from ..checks.cross_tokenizer import compared, has_another
from ..data.datasets import load_splits, with_prompts
from ..data.images import shows_images
from ..data.readers import PromptReader
from ..data.sampling import rollouts_of, scorer_of
from ..images import EncodedPrompt
from ..models.hidden_states import add_teacher_forward
from ..models.loading import check_folder, load_tokenizer, load_whole
from ..models.properties import context_of, placeholder_ids, reads_images, special_ids, stop_ids, unwrap_adapter
from ..reporting.tokens.spans import Reading
from ..rollouts import Rollouts
from ..signals import HiddenStates
from ..teachers.base import Teacher
from ..teachers.cross_tokenizer import CrossTokenizerTeacher, shared_ids


console = foreign_text.console()


def load(name: str, whose: str, dtype: str, device: str) -> Any:
    """A model whose forward gives hidden states, after a check that its logits follow from them."""
    try:
        check_folder(name, whose, "the path")
        model = load_whole(_loader_of(name), name, whose, dtype=dtype).to(device).eval()
        model_checks.check_architecture(model.config, whose)
        add_teacher_forward(model)
        special = special_ids(unwrap_adapter(model).config)  # in whose place there would be images
        first, *others = itertools.islice((token for token in itertools.count() if token not in special), 4)
        probe = rollouts_of([[first]], [others], first, device)
        with torch.no_grad():
            expected = model(input_ids=probe.input_ids).logits[0, :-1]
            states = scorer_of(model)(probe)
            model_checks.check_logits(expected, states.head.logits(states.hidden), whose)
    except (OSError, ValueError) as error:
        raise SystemExit(f"The {whose} {name!r} could not be loaded. ({error})") from None
    return model


def _loader_of(name: str) -> Callable[..., Any]:
    """What loads a model: a text model as a causal LM, a vision-language model as what its configuration names."""
    config = config_of(name)
    if config is None or not reads_images(config):
        return AutoModelForCausalLM.from_pretrained
    if base_of(name) != name:  # an adapter's folder, which has no configuration
        return AutoModelForImageTextToText.from_pretrained
    return functools.partial(create_model_from_path, device_map=None)


def reading_of(tokenizer: Any, name: str, teacher: Any, student: Any, options: Any) -> Reading | None:
    """
    How a teacher with another tokenizer reads completions; `None` if it has the student's.

    Args:
        tokenizer: the student's.
        name (`str`): the teacher's name or folder.
        teacher, student: the models.
        options: of the command: `cross_tokenizer`, `temperature`, `chat_template_kwargs`.
    """
    theirs = load_tokenizer(name)
    if theirs is None or not options.cross_tokenizer or not has_another(tokenizer, theirs):
        check_teacher(tokenizer, name, teacher, student)
        return None
    teacher_stops = sorted(stop_ids(teacher.config, teacher.generation_config, theirs))
    pair, finding = compared(tokenizer, theirs, teacher_stops)
    if pair is None:
        raise SystemExit(f"Student {_folder_of(student)!r}, teacher {name!r}: {finding}")
    stops, _ = stop_ids_of_all([student], tokenizer)
    sizes = [unwrap_adapter(m).config.get_text_config().vocab_size for m in (student, teacher)]
    plain: Any = _OnOneDevice(teacher)
    reader = CrossTokenizerTeacher(
        plain, pair, shared_ids(pair, stops, teacher_stops, *sizes), options.temperature or 1.0
    )
    return Reading(reader.score, pair, theirs, stops, options.chat_template_kwargs)


class _OnOneDevice(Teacher):
    """What a reader needs of a teacher in training, on one device and without an engine."""

    def __init__(self, model: Any):
        self.module, self.scorer = model, scorer_of(model)
        device = next(model.parameters()).device
        self.accelerator = SimpleNamespace(
            device=device, distributed_type=DistributedType.NO, autocast=nullcontext, mixed_precision="no"
        )

    def score(self, rollouts: Rollouts) -> HiddenStates:
        return self.scorer(rollouts)


def check_teacher(tokenizer: Any, teacher: str, model: Any, student: Any) -> None:
    """Stop where token ids mean something else to the teacher."""
    theirs = load_tokenizer(teacher)
    sizes = [unwrap_adapter(m).config.get_text_config().vocab_size for m in (student, model)]
    for finding in (tokenizer_checks.same_tokenizer(tokenizer, theirs), tokenizer_checks.vocabulary(tokenizer, *sizes)):
        if finding.level == "error":
            raise SystemExit(
                f"Student {_folder_of(student)!r}, teacher {teacher!r}: {finding.found} The divergence compares "
                "probabilities id by id. Give `--cross_tokenizer` to compare probabilities of texts, or use models "
                "with the same tokenizer."
            )
        if finding.level == "warning":
            console.print(str(finding), style="yellow")


def _folder_of(model: Any) -> str:
    return str(unwrap_adapter(model).config.name_or_path)


def check_second_student(tokenizer: Any, name: str, model: Any) -> None:
    """Stop where token ids mean something else to the model that `--compare_with` names, or do not exist for it."""
    theirs = load_tokenizer(name)
    finding = tokenizer_checks.same_tokenizer(tokenizer, theirs)
    if finding.level == "error":
        raise SystemExit(
            f"`--compare_with {name}` has another tokenizer than the first student, whose completions it judges by "
            f"their token ids: {_first_difference(tokenizer, theirs)}. Make a report for each of the two."
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    size = unwrap_adapter(model).config.get_text_config().vocab_size
    if needed > size:
        raise SystemExit(
            f"`--compare_with {name}` knows ids up to {size - 1}, but the first student's tokenizer produces ids up to "
            f"{needed - 1}. Compare students with the same tokenizer."
        )


def _first_difference(tokenizer: Any, other: Any) -> str:
    ours, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (tokenizer, other))
    differing = next(i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i))
    return f"id {differing} is {ours.get(differing)!r} to the first and {theirs.get(differing)!r} to the second"


def check_fit(
    rows: Sequence[dict[str, Any]],
    lengths: Sequence[tuple[EncodedPrompt, int]],
    reader: PromptReader,
    configs: dict[str, Any],
    teacher: Any = None,
) -> None:
    """
    Check that every prompt fits into the models, before the first completion is sampled.

    Args:
        rows (`list[dict]`): the rows.
        lengths (`list` of `tuple`): of each row, its prompt as the student reads it, an
            [`~trl_distill.images.EncodedPrompt`], and the tokens of its longest completion.
        reader ([`~trl_distill.data.readers.PromptReader`]): how prompts are read.
        configs (`dict`): configurations of students, by their names in messages.
        teacher (*optional*): the teacher's configuration; it reads the rows' `teacher_prompt`.

    Raises:
        ValueError: a prompt has no tokens, or is too long together with its completion.
    """
    ours = [(len(prompt.ids), completion) for prompt, completion in lengths]
    for whose, config in configs.items():
        _check_lengths(ours, config, whose)
    if teacher is not None:
        theirs = [
            (len(reader.teacher_prompt(row, prompt).ids), completion)
            for row, (prompt, completion) in zip(rows, lengths, strict=True)
        ]
        _check_lengths(theirs, teacher, "teacher")


def _check_lengths(lengths: Sequence[tuple[int, int]], config: Any, whose: str) -> None:
    for place, (prompt, _) in enumerate(lengths):
        if prompt == 0:
            raise ValueError(f"The prompt of row {place} of the dataset has no tokens. Drop such rows.")
    place, longest = max(enumerate(lengths), key=lambda pair: sum(pair[1]), default=(0, (0, 0)))
    finding = model_checks.context_length(*longest, context_of(config.get_text_config()), whose)
    if finding.level == "error":
        raise ValueError(f"{finding} It is row {place} of the dataset, counted from 0.")


def base_of(name: str) -> str:
    """The base model that an adapter's folder names, or the model's own name."""
    adapter = Path(name, "adapter_config.json")
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else name


def config_of(name: str) -> Any:
    """The configuration of a saved model, or of an adapter's base, without its weights; `None` if there is none."""
    try:
        return AutoConfig.from_pretrained(base_of(name))
    except (OSError, ValueError):
        return None


def first_prompts(prompts: str, split: str, most: int) -> Dataset:
    """The rows that are asked about, as a dataset with a column "prompt"."""
    splits = load_splits(prompts)
    if split not in splits:
        raise ValueError(
            f"{prompts} has no split {split!r}, only {', '.join(splits)}. Name one of them with `--dataset_split`."
        )
    dataset = with_prompts(splits[split], parts=shows_images(splits[split]))
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f'{prompts} has the columns {", ".join(dataset.column_names)}, but no "prompt" and no "messages". '
            "Rename the one that holds the questions."
        )
    return dataset.select(range(min(most, len(dataset))))


def never_written(student: Any, teacher: Any = None) -> tuple[int, ...]:
    """Ids that are never drawn: those that the student has and the teacher has not, as in training, and of images."""
    images = placeholder_ids(unwrap_adapter(student).config)
    if teacher is None:
        return tuple(sorted(images))
    theirs, ours = (unwrap_adapter(m).config.get_text_config().vocab_size for m in (teacher, student))
    return tuple(sorted({*images, *range(theirs, ours)}))


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

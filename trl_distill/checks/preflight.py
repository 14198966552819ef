"""The preflight: all checks of one run in order, as a report that stops on errors and can be printed as a table.

The checks themselves are in `checks.py`. `scripts/opd.py --check_only` stops after it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import OPDConfig
from ..heads.fused import DivergenceSpec, fused_divergence
from ..models.loading import load_tokenizer
from ..models.properties import context_of, stop_ids
from ..rollouts import Rollouts
from ..teachers.server import ServedTeacher
from ..teachers.spec import load_teacher_tokenizer, teacher_config, teacher_generation
from . import models as model_checks
from . import tokenizers as tokenizer_checks
from .findings import Report


logger = logging.getLogger(__name__)


LONGEST_OF = 512  # prompts that are tokenised to learn how long they get


PROBE_LENGTH = 64  # tokens of a prompt on which student and teacher are compared


def examine(
    report: Report,
    spec: Any,
    args: OPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    longest_prompt: int | None,
    conversational: bool = True,
) -> tuple[int | None, set[int]]:
    """
    Compare a teacher with the student before it is loaded.

    Args:
        report ([`Report`]): takes what is found.
        spec: a hub name or folder, a model, a teacher behind a server. Others bring nothing that could be compared.
        args ([`OPDConfig`]): for loading.
        tokenizer: the student's.
        student: the student, without adapter.
        longest_prompt (`int`, *optional*): in tokens, where it is known.
        conversational (`bool`): whether prompts go through a chat template.

    Returns:
        The size of the teacher's vocabulary, where it is known, and the ids that end a turn for it.
    """
    served = isinstance(spec, ServedTeacher)
    if not served and not isinstance(spec, str | nn.Module):
        return None, set()
    config = None if served else teacher_config(spec, args)
    teacher = load_tokenizer(spec.model) if isinstance(spec, ServedTeacher) else load_teacher_tokenizer(spec, args)
    report.add(
        tokenizer_checks.same_tokenizer(tokenizer, teacher, args.assume_same_tokenizer, served),
        tokenizer_checks.chat_templates(tokenizer, teacher, conversational),
    )
    stops = stop_ids(config, teacher_generation(spec, args), teacher)
    if config is None:
        return None, stops
    text = config.get_text_config()
    student_size = student.config.get_text_config().vocab_size
    report.add(tokenizer_checks.vocabulary(tokenizer, student_size, text.vocab_size, args.assume_same_tokenizer))
    if longest_prompt is not None:
        report.add(
            model_checks.context_length(longest_prompt, args.max_completion_length or 0, context_of(text), "teacher")
        )
    return text.vocab_size, stops


@torch.no_grad()
def probe_kl(student: nn.Module, teacher: Any, accelerator: Any, ids: list[int]) -> float:
    """KL(student ‖ teacher) on the last tokens of one prompt, in nats per token."""
    input_ids = torch.tensor([ids[-PROBE_LENGTH:]], device=accelerator.device)
    if input_ids.shape[1] < 2:
        input_ids = input_ids.repeat(1, 2)
    attention_mask = torch.ones_like(input_ids)
    probe = Rollouts(input_ids, attention_mask, attention_mask[:, 1:].bool())
    signal, training = teacher.score(probe), student.training
    student.eval()
    with accelerator.autocast():
        states = student(input_ids=input_ids, attention_mask=attention_mask, rollouts=probe)
        found = fused_divergence(states.hidden, states.head, signal.hidden, signal.head, DivergenceSpec())
    student.train(training)
    return found.divergence.mean().item()


def prompts_to_look_at(dataset: Any, column: str = "prompt") -> list[Any]:
    """The first prompts of a dataset that can be read without consuming it."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return []
    return [prompt for prompt in dataset[:LONGEST_OF][column] if prompt]

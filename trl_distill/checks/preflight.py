"""The preflight: all checks of one run in order, as a report that stops on errors and can be printed as a table.

The checks themselves are in `checks.py`. `scripts/opd.py --check_only` stops after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import checks
from .checks import Finding
from .config import OPDConfig
from .forwards import unwrap_adapter
from .fused import Form, fused_divergence
from .loading import load_tokenizer
from .served import ServedTeacher
from .signals import Rollouts
from .teachers import hub_kwargs, load_teacher_tokenizer, teacher_config


logger = logging.getLogger(__name__)

LONGEST_OF = 512  # prompts that are tokenised to learn how long they get
PROBE_LENGTH = 64  # tokens of a prompt on which student and teacher are compared


class PreflightError(ValueError):
    """
    What a run cannot get past.

    Attributes:
        report ([`Report`]): everything that was found until then.
    """

    def __init__(self, report: Report):
        errors = [str(finding) for finding in report.findings if finding.level == "error"]
        super().__init__("\n\n".join(errors))
        self.report = report


@dataclass
class Report:
    """What the checks found, in order."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def stop_on_errors(self) -> None:
        """Raise [`PreflightError`], a `ValueError`, with everything that a run cannot get past."""
        if self.count("error"):
            raise PreflightError(self)

    def warn(self) -> None:
        """Log what may be wrong, and how much was looked at."""
        for finding in self.findings:
            if finding.level == "warning":
                logger.warning(str(finding))
            elif finding.check == "stop tokens" and "one class" in finding.found:
                logger.warning(finding.found)
        logger.info(f"Preflight: {len(self.findings)} checks, {self.count('warning')} warnings.")

    def table(self) -> Any:
        """A `rich` table with a line for each check, and what it adds up to."""
        from rich.table import Table

        colours = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "red"}
        table = Table(title="Preflight", show_lines=True)
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("found, and what it means", ratio=3, overflow="fold")
        table.add_column("what to change", ratio=2, overflow="fold")
        for finding in self.findings:
            level = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(finding.check, level, _plain(finding.found), _plain(finding.advice))
        table.caption = f"{len(self.findings)} checks, {self.count('warning')} warnings, {self.count('error')} errors"
        return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


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
        checks.same_tokenizer(tokenizer, teacher, args.assume_same_tokenizer, served),
        checks.chat_templates(tokenizer, teacher, conversational),
    )
    stops = stop_ids(config, teacher_generation(spec, args), teacher)
    if config is None:
        return None, stops
    text = config.get_text_config()
    student_size = student.config.get_text_config().vocab_size
    report.add(checks.vocabulary(tokenizer, student_size, text.vocab_size, args.assume_same_tokenizer))
    if longest_prompt is not None:
        report.add(checks.context_length(longest_prompt, args.max_completion_length or 0, context_of(text), "teacher"))
    return text.vocab_size, stops


def teacher_generation(spec: Any, args: OPDConfig) -> GenerationConfig | None:
    """The settings that a teacher generates with, where it brings any."""
    if isinstance(spec, nn.Module):
        return getattr(unwrap_adapter(spec), "generation_config", None)
    try:
        if isinstance(spec, ServedTeacher):
            return GenerationConfig.from_pretrained(spec.model)
        return GenerationConfig.from_pretrained(spec, **hub_kwargs(args))
    except (OSError, ValueError):
        return None


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
        found = fused_divergence(states.hidden, states.head, signal.hidden, signal.head, Form())
    student.train(training)
    return found.divergence.mean().item()


def prompts_to_look_at(dataset: Any, column: str = "prompt") -> list[Any]:
    """The first prompts of a dataset that can be read without consuming it."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return []
    return [prompt for prompt in dataset[:LONGEST_OF][column] if prompt]

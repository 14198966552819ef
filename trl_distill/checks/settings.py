"""What is checked before the first step: everything here would otherwise fail late, or train on a wrong number.

Functions of configurations, tokenizers, datasets and numbers. Those that a run cannot get past raise at once; the
others return a [`Finding`], and `preflight.py` decides what becomes of them. Training is left to the trainer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass
class Finding:
    """
    What one check found.

    Attributes:
        check (`str`): what was looked at, two or three words.
        level (`str`): "ok", "skipped" (could not be looked at), "warning" (the run may go on) or "error" (it may not).
        found (`str`): what was found and what it means.
        advice (`str`): what to change; empty where all is well.
    """

    check: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found} {self.advice}".strip()


def check_text_only(config: PretrainedConfig, whose: str) -> None:
    """Refuse vision-language models."""
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"The {whose} is a vision-language model ({config.model_type}). Distilling those has not been run yet and "
            "is refused; use a text model."
        )


def check_logits(expected: torch.Tensor, computed: torch.Tensor, whose: str) -> None:
    """
    What we compute from hidden states must be what the model itself puts out.

    Args:
        expected (`torch.Tensor` of shape `(..., V)`): the model's logits for a few tokens.
        computed (`torch.Tensor` of shape `(..., V)`): ours, from its last hidden state and head.
        whose (`str`): "student" or "teacher".
    """
    expected, computed = expected.float().log_softmax(-1), computed.float().log_softmax(-1)
    difference, spread = (expected - computed).abs().mean().item(), expected.std().item()
    if not difference < 0.02 + 0.05 * spread:  # above rounding in bf16, far below a missing scale; NaN fails too
        raise ValueError(
            f"The {whose}'s logits do not follow from its last hidden state and LM head: log-probabilities differ by "
            f"{difference:.3g} nats on average. Its architecture transforms them in a way that is not known here, and "
            "the divergence would be that of another distribution."
        )


def same_tokenizer(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    assume_same: bool = False,
    served: bool = False,
) -> Finding:
    """
    The divergence compares probabilities id by id, so an id must be the same token for both.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's, or `None` where it is not known.
        assume_same (`bool`): a difference is no error.
        served (`bool`): the teacher is behind a server, so its tokenizer can only be found by the model's name.
    """
    if teacher is None and served:
        return Finding(
            "tokenizer",
            "warning",
            "The served teacher's name leads to no tokenizer here, so it was not checked that its token ids mean what "
            "they mean to the student.",
            "Serve it under its hub name or folder (`--served-model-name`) to have this checked.",
        )
    if teacher is None:
        return Finding(
            "tokenizer",
            "warning",
            "The teacher came without a tokenizer, so it was not checked that its token ids mean what they mean to the "
            "student.",
            "Load the teacher from a folder or hub name that holds its tokenizer to have this checked.",
        )
    of_student = {index: token for token, index in student.get_vocab().items()}
    of_teacher = {index: token for token, index in teacher.get_vocab().items()}
    differing = [i for i in sorted(of_student.keys() | of_teacher.keys()) if of_student.get(i) != of_teacher.get(i)]
    moved = {of_student.get(i) for i in differing} & {of_teacher.get(i) for i in differing} - {None}
    clashing = [i for i in differing if i in of_student and i in of_teacher]
    if differing and not clashing and not moved:
        shown = ", ".join(f"{i}: {of_student.get(i, of_teacher.get(i))!r}" for i in differing[:5])
        return Finding(
            "tokenizer",
            "warning",
            f"{len(differing)} ids are known to only one of the two tokenizers; all others agree. The first: {shown}.",
            "Make sure that prompts and answers do without them.",
        )
    if differing:
        shown = "; ".join(f"{i}: {of_student.get(i)!r} against {of_teacher.get(i)!r}" for i in differing[:5])
        found = (
            f"The tokenizers of student and teacher differ in {len(differing)} of {len(of_student)} ids. The first, "
            f"student against teacher: {shown}."
        )
        if assume_same:
            return Finding("tokenizer", "warning", found, "Going on, as `assume_same_tokenizer=True` asks.")
        advice = (
            "The divergence compares probabilities id by id, so it would compare different tokens. Use a teacher with "
            "the student's tokenizer, or set `assume_same_tokenizer=True` if these ids do not matter."
        )
        return Finding("tokenizer", "error", found, advice)
    special = [
        f"{name} {getattr(student, name)!r} against {getattr(teacher, name)!r}"
        for name in ("bos_token", "unk_token")  # padding is never attended to
        if getattr(student, name) != getattr(teacher, name)
    ]
    if special:
        return Finding(
            "tokenizer",
            "warning",
            f"Same ids, other special tokens, student against teacher: {', '.join(special)}.",
            "The teacher reads what the student's tokenizer writes: make sure that it was trained to.",
        )
    return Finding("tokenizer", "ok", f"The same {len(of_student)} ids and special tokens.")


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, student_size: int, teacher_size: int, assume_same: bool = False
) -> Finding:
    """Every id that the tokenizer can produce must have a row in the teacher's embedding; padding may differ."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > teacher_size and not assume_same:
        return Finding(
            "vocabulary",
            "error",
            f"The tokenizer produces ids up to {needed - 1}, but the teacher's vocabulary ends at {teacher_size - 1}.",
            "Use a teacher for this tokenizer, or set `assume_same_tokenizer=True` if those ids never occur.",
        )
    if student_size == teacher_size:
        return Finding("vocabulary", "ok", f"{student_size} rows each.")
    return Finding(
        "vocabulary",
        "ok",
        f"{student_size} rows against the teacher's {teacher_size}, {needed} ids in use; the shared rows count.",
    )


def stop_tokens(tokenizer: PreTrainedTokenizerBase, student: set[int], teacher: set[int], merge: bool) -> Finding:
    """Whether student and teacher end a turn with the same ids."""
    if student == teacher:
        return Finding("stop tokens", "ok", f"Both end with {_named(tokenizer, student)}.")
    found = f"The student ends with {_named(tokenizer, student)}, the teacher with {_named(tokenizer, teacher)}."
    if merge:
        return Finding("stop tokens", "ok", f"{found} They are compared as one class.")
    return Finding(
        "stop tokens",
        "warning",
        f"{found} The teacher charges the student for every stop, and completions will grow.",
        "Leave `merge_stop_tokens` on, or give both the same stop tokens.",
    )


def _named(tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(ids)) or "nothing"


PROBE_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def chat_templates(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, conversational: bool = True
) -> Finding:
    """Whether both render a conversation alike: the teacher reads prompts in the student's template."""
    if not conversational and getattr(teacher, "chat_template", None) and getattr(student, "chat_template", None):
        return Finding(
            "chat template",
            "warning",
            "Prompts are text, so no chat template is used, although both models have one.",
            "If they were trained to chat, give them messages: `[{'role': 'user', 'content': ...}]` as the prompt.",
        )
    if not conversational:
        return Finding("chat template", "ok", "Prompts are text; none is used.")
    if teacher is None or getattr(teacher, "chat_template", None) is None:
        return Finding("chat template", "ok", "The teacher brings none of its own; it reads the student's.")

    def rendered(tokenizer: Any) -> str:
        for messages in (PROBE_CONVERSATION, PROBE_CONVERSATION[1:]):  # some templates take no system message
            try:
                return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception:  # templates are programs, and raise what they like
                continue
        return ""

    of_student, of_teacher = rendered(student), rendered(teacher)
    if of_student == of_teacher:
        return Finding("chat template", "ok", "Both render a conversation alike.")
    return Finding(
        "chat template",
        "warning",
        f"The teacher reads prompts in the student's chat template, which is not its own: {of_student!r} against "
        f"{of_teacher!r}.",
        "Distil in the format that the teacher was trained on: give the student's tokenizer its template "
        "(`processing_class.chat_template`), thinking mode included (`chat_template_kwargs`).",
    )


def context_length(longest_prompt: int, completion: int, context: int | None, whose: str) -> Finding:
    """Whether the longest prompt and completion, in tokens, fit into a model's positions."""
    check = f"context, {whose}"
    known = context is not None and context > 0  # some configurations write -1
    if context is None or not known or longest_prompt + completion <= context:
        limit = f"{context} positions" if known else "no limit known"
        return Finding(check, "ok", f"Prompts of up to {longest_prompt} tokens and {completion} more; {limit}.")
    return Finding(
        check,
        "error",
        f"The longest prompt has {longest_prompt} tokens and completions up to {completion}, but the {whose} has "
        f"{context} positions.",
        f"Lower `max_completion_length` to {max(context - longest_prompt, 0)}, or drop the longest prompts.",
    )


def teacher_differs(
    kl: float, explained: str, override: bool, name: str = "", own: bool = False, rough: bool = False
) -> Finding:
    """
    Whether there is anything to learn: KL(student ‖ teacher) on tokens of a few prompts.

    Args:
        kl (`float`): nats per token.
        explained (`str`): why the two may start out equal, e.g. "there is a reward"; empty where nothing does.
        override (`bool`): `assume_different_teacher`.
        name (`str`): of this teacher, where there are several.
        own (`bool`): the teacher is the student itself, without its adapter or averaged.
        rough (`bool`): probabilities are computed in 16 bits, whose rounding looks like a small KL.
    """
    check = f"teacher differs, {name}" if name else "teacher differs"
    if SAME_MODEL_KL < kl < ROUNDING_KL and rough and not (explained or override):
        return Finding(
            check,
            "warning",
            f"KL(student ‖ teacher) is only {kl:.1g} nats per token of the prompts, what rounding alone may leave.",
            "Make sure that the teacher is not the student under another name.",
        )
    if kl > SAME_MODEL_KL:
        told = f"KL(student ‖ teacher) is {kl:.3g} nats per token of the prompts; on completions it will be another."
        return Finding(check, "ok", told)
    who = f"The student and the teacher {name!r}" if name else "Student and teacher"
    found = f"{who} give the same probabilities (KL {kl:.1g} nats per token of the prompts)."
    if own and explained:
        return Finding(check, "ok", f"They start out equal, as they should; {explained}.")
    if explained or override:
        return Finding(check, "warning", f"{found} Going on: {explained or '`assume_different_teacher=True`'}.")
    if own:
        return Finding(
            check,
            "error",
            f"{found} The teacher is the student itself, so there is nothing to learn.",
            "Give it prompts of its own (a `teacher_prompt` column) or a reward, start from an adapter that is trained "
            "already, or set `assume_different_teacher=True`.",
        )
    return Finding(
        check,
        "error",
        f"{found} The teacher's weights are those of the student, so there is nothing to learn.",
        "Check the two paths. If it is intended, give the teacher prompts of its own (a `teacher_prompt` column) or a "
        "reward, or set `assume_different_teacher=True`.",
    )


ROUNDING_KL = 1e-3  # nats per token; between equal weights in 16 bits, a few times 1e-4
SAME_MODEL_KL = 1e-6  # nats per token; fp32 rounding is below it, and any training step above


def completions(cut: int, looked_at: int, limit: int) -> Finding:
    """How many of the dataset's completions are longer than rollouts may be, and lose their end."""
    if not cut:
        return Finding("completions", "ok", f"{looked_at} looked at; none is longer than {limit} tokens.")
    return Finding(
        "completions",
        "warning",
        f"{cut} of {looked_at} completions that were looked at are longer than {limit} tokens and are cut, so that "
        "their end is not learnt.",
        "Raise `max_completion_length`, or filter the dataset.",
    )


def checkpoint_boundary(save_steps: float, accumulation: int, generate_every: int) -> Finding:
    """
    Whether a checkpoint falls inside a generation batch.

    Resuming from such a checkpoint generates anew in the middle, so the run is not the uninterrupted one.

    Args:
        save_steps (`float`): optimizer steps between checkpoints; a share of all steps (below 1) is not checked.
        accumulation (`int`): micro-steps per optimizer step.
        generate_every (`int`): micro-steps per generation batch, all iterations over it included.
    """
    if save_steps < 1 or int(save_steps) * accumulation % generate_every == 0:
        return Finding("checkpoints", "ok", "They fall on the end of a generation batch.")
    return Finding(
        "checkpoints",
        "warning",
        f"`save_steps={int(save_steps)}` does not fall on the end of a generation batch, which lasts "
        f"{generate_every / accumulation:g} optimizer steps. A run resumed from there generates anew in the middle of "
        "one and will not repeat the uninterrupted run exactly.",
        "Choose a multiple to avoid it.",
    )


def sampling(biased: list[str]) -> Finding:
    """Score functions take the rollouts for samples of the student's whole distribution; `biased` says what is not."""
    if not biased:
        return Finding("sampling", "ok", "Rollouts are samples of the student, as far as the estimator asks.")
    return Finding(
        "sampling",
        "warning",
        f"{', '.join(biased)} changes the distribution that rollouts are sampled from, which biases the part of the "
        "teacher's term that is learnt from sampled tokens.",
        "Leave it out, or use kl_estimator='full' with kl_discount=0.",
    )


def groups(generations: int | None, prompts: int, rewarded: bool) -> Finding:
    """Rewards are compared within the completions of one prompt; `OPDConfig.resolved` has refused groups of one."""
    batch = f"{prompts} prompts with {generations} completions each in a generation batch"
    if rewarded or generations == 1:
        return Finding("groups", "ok", f"{batch}, {'with' if rewarded else 'without'} rewards.")
    return Finding(
        "groups",
        "warning",
        f"{batch}, but no rewards to compare them by.",
        "Set `num_generations=1`: more prompts teach more than more answers to one.",
    )

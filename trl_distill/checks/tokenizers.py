"""Checks of tokenizers: ids, stop tokens, chat templates."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .findings import Finding


def same_tokenizer(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    assume_same: bool = False,
    served: bool = False,
) -> Finding:
    """
    Whether an id is the same token for student and teacher; the divergence compares probabilities id by id.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer, or `None` if unknown.
        assume_same (`bool`): report differences as a warning instead of an error.
        served (`bool`): whether the teacher is served, so that its tokenizer can only be found by the model's name.
    """
    if teacher is None:
        return _not_known(served)
    return _differing_ids(student, teacher, assume_same) or _differing_special_tokens(student, teacher)


def _not_known(served: bool) -> Finding:
    if served:
        return Finding(
            "tokenizer",
            "warning",
            "No tokenizer was found under the served teacher's name, so it was not checked that its token ids mean "
            "the same as the student's.",
            "Serve it under its hub name or folder (`--served-model-name`) to have this checked.",
        )
    return Finding(
        "tokenizer",
        "warning",
        "The teacher has no tokenizer with it, so it was not checked that its token ids mean the same as the "
        "student's.",
        "Load the teacher from a folder or hub name that holds its tokenizer to have this checked.",
    )


def _differing_ids(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, assume_same: bool
) -> Finding | None:
    """A finding about ids that are not the same token for both; `None` if there are none."""
    of_student = {index: token for token, index in student.get_vocab().items()}
    of_teacher = {index: token for token, index in teacher.get_vocab().items()}
    ids = sorted(of_student.keys() | of_teacher.keys())
    differing = [i for i in ids if of_student.get(i) != of_teacher.get(i)]
    if not differing:
        return None
    moved = {of_student.get(i) for i in differing} & {of_teacher.get(i) for i in differing} - {None}
    if not moved and not any(i in of_student and i in of_teacher for i in differing):
        shown = ", ".join(f"{i}: {of_student.get(i, of_teacher.get(i))!r}" for i in differing[:5])
        return Finding(
            "tokenizer",
            "warning",
            f"{len(differing)} ids exist in only one of the two tokenizers; all others agree. The first: {shown}.",
            "Make sure that prompts and completions do not use them.",
        )
    shown = "; ".join(f"{i}: {of_student.get(i)!r} against {of_teacher.get(i)!r}" for i in differing[:5])
    found = (
        f"The tokenizers of student ({len(of_student)} ids) and teacher ({len(of_teacher)}) differ in "
        f"{len(differing)} of {len(ids)} ids. The first, student against teacher: {shown}."
    )
    if assume_same:
        return Finding("tokenizer", "warning", found, "Continuing, as `assume_same_tokenizer=True` is set.")
    return Finding(
        "tokenizer",
        "error",
        found,
        "The divergence compares probabilities id by id, so it would compare different tokens. Set "
        "`cross_tokenizer=True` to compare probabilities of texts, use a teacher with the student's tokenizer, or set "
        "`assume_same_tokenizer=True` if these ids do not matter.",
    )


def _differing_special_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding:
    special = [
        f"{name} {getattr(student, name)!r} against {getattr(teacher, name)!r}"
        for name in ("bos_token", "unk_token")  # padding is never attended to
        if getattr(student, name) != getattr(teacher, name)
    ]
    if special:
        return Finding(
            "tokenizer",
            "warning",
            f"Same ids, but different special tokens, student against teacher: {', '.join(special)}.",
            "The teacher gets text from the student's tokenizer: make sure that it was trained on such text.",
        )
    return Finding("tokenizer", "ok", f"The same {len(student.get_vocab())} ids and special tokens.")


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, student_size: int, teacher_size: int, assume_same: bool = False
) -> Finding:
    """
    Whether the teacher has every id that the student can be given or write; padding rows may differ.

    A tokenizer may have ids that neither model has, such as the image token of text-only Gemma 3 models.
    """
    needed = min(max(tokenizer.get_vocab().values()) + 1, student_size)
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
        f"{student_size} rows against the teacher's {teacher_size}; {needed} ids are in use. The shared rows count.",
    )


def stop_tokens(tokenizer: PreTrainedTokenizerBase, student: set[int], teacher: set[int], merge: bool) -> Finding:
    """Whether student and teacher end a turn with the same ids."""
    if student == teacher:
        return Finding("stop tokens", "ok", f"Both end with {named(tokenizer, student)}.")
    found = f"The student ends with {named(tokenizer, student)}, the teacher with {named(tokenizer, teacher)}."
    if merge:
        return Finding("stop tokens", "ok", f"{found} They are compared as one class.", notify=True)
    return Finding(
        "stop tokens",
        "warning",
        f"{found} The student would be penalised for every stop, and completions would grow.",
        "Leave `merge_stop_tokens` on, or give both the same stop tokens.",
    )


def named(tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> str:
    """Ids with their tokens, for messages."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(ids)) or "nothing"


PROBE_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def chat_templates(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    conversational: bool = True,
    template_kwargs: dict[str, Any] | None = None,
) -> Finding:
    """
    Whether both render a conversation the same way; the teacher gets prompts in the student's template.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer, or `None` if unknown.
        conversational (`bool`): whether prompts are messages.
        template_kwargs (`dict`, *optional*): keyword arguments of the student's template, and of the teacher's here.
    """
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
        return Finding("chat template", "ok", "The teacher has none; it gets prompts in the student's.")

    of_student, of_teacher = _probe(student, template_kwargs), _probe(teacher, template_kwargs)
    if of_student is None or of_teacher is None:
        whose = "student's" if of_student is None else "teacher's"
        return Finding(
            "chat template",
            "skipped",
            f"A test conversation could not be rendered in the {whose} chat template, so the two were not compared.",
            "Compare them by hand: the teacher gets prompts in the student's.",
        )
    if of_student == of_teacher:
        return Finding("chat template", "ok", "Both render a conversation the same way.")
    return Finding(
        "chat template",
        "warning",
        f"The teacher gets prompts in the student's chat template, which differs from its own: {of_student!r} against "
        f"{of_teacher!r}.",
        "Distil in the format that the teacher was trained on: give the student's tokenizer its template "
        "(`processing_class.chat_template`), thinking mode included (`chat_template_kwargs`).",
    )


def _probe(tokenizer: Any, template_kwargs: dict[str, Any] | None) -> str | None:
    """A short conversation in a tokenizer's chat template; `None` if it cannot be rendered."""
    for messages in (PROBE_CONVERSATION, PROBE_CONVERSATION[1:]):  # some templates allow no system message
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
            )
        except Exception:  # templates are programs and may raise anything
            continue
    return None

"""Checks of a teacher with another tokenizer: whether completions can be aligned, and both tokenizers side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..alignment.completions import align
from ..alignment.spellings import shown, spellings
from ..alignment.text_tokenizer import TextTokenizer
from ..alignment.vocabularies import Vocabularies, vocabularies
from ..teachers.pool import check_readers
from .findings import Finding
from .tokenizers import PROBE_CONVERSATION, named, same_tokenizer


MOST_CHANGED = 0.05  # of the student's tokens; with more, much of what it writes would count as off the path
MOST_SHOWN = 10  # spans in the preflight
MARKERS = {"<think>": "</think>", "<|channel|>": None, "<|start_think|>": "<|end_think|>"}  # of a thought, and its end


def has_another(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None) -> bool:
    """Whether a teacher's ids are not the student's; unknown ones are taken for other ones."""
    return teacher is None or same_tokenizer(student, teacher).level == "error"


def needless() -> Finding:
    """No teacher has another tokenizer."""
    return Finding(
        "tokenizer",
        "warning",
        "`cross_tokenizer=True`, but every teacher has the student's token ids, and is compared id by id as before.",
        "Leave it out.",
    )


def weights(dataset: Any, of_all: Any, names: list[str], readers: set[str]) -> list[Finding]:
    """
    Whether a teacher with another tokenizer has a negative weight: an error, if so.

    Args:
        dataset: the training dataset; the rows of a stream are looked at when they come.
        of_all (`dict[str, float]`, *optional*): `teacher_weights`.
        names (`list[str]`): of all teachers.
        readers (`set[str]`): those with another tokenizer.
    """
    given = [] if of_all is None else [("`teacher_weights` has", of_all)]
    if isinstance(dataset, Dataset) and "teacher" in dataset.column_names:
        rows = enumerate(dataset["teacher"])
        given += [(f"Row {i} of the training dataset has", own) for i, own in rows if isinstance(own, dict)]
    for where, own in given:
        try:
            check_readers({name: own.get(name) or 0.0 for name in names}, readers, where)
        except ValueError as error:
            return [Finding("teachers", "error", str(error))]
    return []


def compared(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    teacher_stops: Sequence[int],
    served: bool = False,
) -> tuple[Vocabularies | None, Finding]:
    """
    Compare two tokenizers for `cross_tokenizer=True`.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer, or `None` if unknown.
        teacher_stops (`Sequence[int]`): the teacher's ids that end a turn.
        served (`bool`): whether the teacher is served, so that its tokenizer can only be found by the model's name.

    Returns:
        The [`~trl_distill.alignment.vocabularies.Vocabularies`], `None` if the finding is an error, and the finding.
    """
    if teacher is None:
        return None, _error(
            "The teacher has no tokenizer with it, but with `cross_tokenizer=True` it reads text.",
            "Serve it under its hub name or folder (`--served-model-name`)."
            if served
            else "Load the teacher from a folder or hub name that holds its tokenizer.",
        )
    if not teacher_stops:
        return None, _error(
            "No stop token of the teacher is known, so that the student could not learn where to end.",
            "Set `eos_token_id` in the teacher's generation configuration.",
        )
    try:
        pair = vocabularies(TextTokenizer(student, "student"), TextTokenizer(teacher, "teacher"))
    except ValueError as error:
        return None, _error(str(error), "")
    unlike = _unlike(pair)
    if unlike is not None:
        return None, unlike
    sizes = len(pair.student), len(pair.teacher)
    return pair, Finding(
        "tokenizer",
        "ok",
        f"Another tokenizer: {sizes[0]} ids of the student, {sizes[1]} of the teacher, {len(pair.shared)} shared by "
        f"their bytes, {len(pair.closed)} of them closed. Where both begin anew the divergence is exact over "
        "those, elsewhere it comes from sampled tokens.",
        notify=True,
    )


def _error(found: str, advice: str) -> Finding:
    return Finding("tokenizer", "error", found, advice)


def _unlike(pair: Vocabularies) -> Finding | None:
    """Whether the teacher can write what the student writes, with an example if not; `None` if it can."""
    tokens = [i for i, _ in pair.student.ordinary()]
    if len(pair.changed) <= MOST_CHANGED * len(tokens):
        return None
    text = (pair.student.piece(pair.changed[0]) or b"").decode()
    read = (pair.teacher.text_bytes(pair.teacher.encode(text)) or b"").decode("utf-8", "replace")
    return _error(
        f"The teacher's tokenizer does not keep the text of {len(pair.changed)} of the student's {len(tokens)} tokens: "
        f"{text!r} becomes {read!r}. Completions of both could not be aligned.",
        "Use a teacher whose tokenizer keeps text as it is, or one with the student's tokenizer.",
    )


def stop_tokens(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    stops: Sequence[int],
    teacher_stops: Sequence[int],
) -> Finding:
    """The stop tokens of both, each of which are one class."""
    return Finding(
        "stop tokens",
        "ok",
        f"The student ends with {named(student, set(stops))}, the teacher with {named(teacher, set(teacher_stops))}: "
        "any of the one counts as any of the other.",
    )


def spans(pair: Vocabularies, completions: Sequence[tuple[Sequence[int], bool]], whose: str, name: str = "") -> Finding:
    """
    How completions are spelled by both tokenizers: the share of tokens that are exact, and the commonest spans.

    Args:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        completions (`list` of `tuple[list[int], bool]`): the student's ids, without a stop token; whether one follows.
        whose (`str`): who wrote them, such as "the teacher's first completions".
        name (`str`): the teacher's, if there are several.
    """
    counts: Counter[str] = Counter()
    tokens = exact = charged = whole = 0
    for ids, stopped in completions:
        aligned = align(pair, ids, stopped)
        tokens += len(ids) + stopped
        charged += sum(aligned.charged)
        for spelling in spellings(pair, ids, aligned):
            exact, whole = exact + spelling.exact, whole + 1
            if not spelling.exact and spelling.student:
                counts[shown(pair, spelling)] += 1
    check = f"spans, {name}" if name else "spans"
    if not tokens:
        return Finding(check, "skipped", "There are no completions to look at.")
    examples = "; ".join(f"{text} ({count})" for text, count in counts.most_common(MOST_SHOWN))
    found = (
        f"Of {tokens} tokens of {whose}, {exact / tokens:.0%} are exact, in {whole} spans; {charged} would be charged "
        "for leaving the canonical tokens. "
    )
    return Finding(
        check, "ok", found + (f"The commonest other spans, student against teacher: {examples}." if examples else "")
    )


def respelled(pair: Vocabularies, ids: Sequence[int]) -> list[int]:
    """The student's tokens for a text in the teacher's; a character that is not whole is left out."""
    return pair.student.encode((pair.teacher.text_bytes(list(ids)) or b"").decode("utf-8", "ignore"))


def thoughts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None
) -> Finding:
    """Whether one model's chat template opens a thought before the answer and the other's does not."""
    ends = [_generation_prompt(tokenizer, template_kwargs) for tokenizer in (student, teacher)]
    if None in ends:
        return Finding("chat template", "ok", "Prompts are given to each model in its own form.")
    if _opens_thought(str(ends[0])) != _opens_thought(str(ends[1])):
        return Finding(
            "chat template",
            "error",
            f"Before an answer the student's template writes {ends[0]!r}, the teacher's {ends[1]!r}: one of them opens "
            "a thought, so that the same completion would be a thought for one and an answer for the other.",
            "Give both the same thinking mode, such as `chat_template_kwargs={'enable_thinking': False}`, or give the "
            "student's tokenizer another `chat_template`.",
        )
    return Finding(
        "chat template",
        "ok",
        "Each model gets prompts in its own template. Before an answer the student's writes "
        f"{ends[0]!r}, the teacher's {ends[1]!r}.",
    )


def _opens_thought(end: str) -> bool:
    """Whether a thought has begun where an answer begins; one that is closed, such as an empty one, is none."""
    return any(mark in end and not (close and close in end.rpartition(mark)[2]) for mark, close in MARKERS.items())


def _generation_prompt(tokenizer: Any, template_kwargs: dict[str, Any] | None) -> str | None:
    """What the chat template writes between the conversation and an answer; `None` if it cannot be rendered."""
    try:
        short, full = (
            tokenizer.apply_chat_template(
                PROBE_CONVERSATION[1:], tokenize=False, add_generation_prompt=wanted, **(template_kwargs or {})
            )
            for wanted in (False, True)
        )
    except Exception:  # templates are programs and may raise anything
        return None
    return full[len(short) :] if full.startswith(short) else None


def check_writers(writers: dict[str, Any]) -> None:
    """Raise `ValueError` if completions hold what the student did not write, or prompts are not in the dataset."""
    for name, given in writers.items():
        if given:
            raise ValueError(
                f"`{name}` is given, but with `cross_tokenizer=True` the teacher reads a row's prompt and one answer "
                f"of the student. Leave `{name}` out, or use a teacher with the student's tokenizer."
            )

"""Reads a judge's verdict: what stands after the last "Score:" or "Verdict:" of its answer, or none if it is in doubt.

A verdict that is missing costs one completion; one that is misread spoils the dataset without a word. So a fraction, a
range, a percentage or an instruction that the judge repeats is not a verdict. Scores of one answer and choices between
two are read by the same rules. Asking the judge is left to `judge.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


_MARKS = r"[*_`]*"  # emphasis of Markdown


# what may stand before it in its line: a whole sentence, or marks of a quote, table, list, heading or tag, and then
# words such as "So my final"
_BEFORE = re.compile(
    rf"(?:.*[.!?。！？][*_`)\]\"'”’]*\s+|\s*(?:>\s*)*(?:\|\s*)?(?:<\w+>\s*)?(?:[-*•]\s+|\#{{1,6}}\s+)?){_MARKS}"
    r"(?:(?:so|therefore|thus|hence|my|the|final|overall|total|verdict|answer|judge?ment|conclusion)[*_`]*[,:]?[*_`]*\s+)*"
    rf"{_MARKS}(?P<quote>[\"'“‘]?){_MARKS}",
    re.IGNORECASE,
)


# a line that speaks of what one might write: "It would be wrong to write: ok. Score: 1"
_SUPPOSED = re.compile(r"\b(?:writ(?:e|ing)|say(?:ing)?|reply(?:ing)?|answering)\b[^\n]*:", re.IGNORECASE)


# words after a number that may take it back
_WITHDRAWN = re.compile(
    r"\b(?:wait|actually|unless|maybe|perhaps|zero|none|revis\w*|correction|scratch)\b|\bno\b\s*[,;:.!\-\u2013\u2014]",
    re.IGNORECASE,
)


# what a number or a choice begins with: brackets, emphasis or \boxed{}
_OPENING = rf"\s*{_MARKS}\s*{_MARKS}(?P<open>\\boxed\{{|[\[({{<]{{0,2}}){_MARKS}"


# what an explanation after the number begins with
_SENTENCE = re.compile(r"(?:[.!,;]\s|\s+[(\[]|\s+[-\u2013\u2014]\s)")


# the end of a line after a number: a full stop, a table's bar, closing tags or a tick
_END = re.compile(rf"\s*[.!]?{_MARKS}\s*(?:\||(?:</\w+>\s*)+|[✓✔✅☑]\ufe0f?)?\s*")


# words that make the number a part of another scale
_SCALE = re.compile(r"%|‰|\bout of\b|\bper ?cent\b|\bhal(?:f|ves)\b", re.IGNORECASE)


# thoughts begin
_THOUGHT = re.compile(r"<think(?:ing)?>|<thought>|<reasoning>|\[THINK\]|\u25c1think\u25b7", re.IGNORECASE)


# thoughts end
_THOUGHT_END = re.compile(
    r"</think(?:ing)?>|</thought>|</reasoning>|\[/THINK\]|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)


# what must close each sign that was opened
_CLOSING = {"[": "]", "(": ")", "{": "}", "<": ">", '"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "": ""}


# a JSON object at the end, on lines of its own
_OBJECT = re.compile(r"(?:^|\n)\s*(\{[^{}]*\})\s*(?:```)?\s*$")


QUOTED = 16  # characters before "Score:" from which an answer that shares them with the question repeats it


@dataclass(frozen=True)
class Form:
    """
    What a judge is asked to end with.

    Args:
        word (`str`): what stands before the colon, in lower case.
        value (`str`): pattern of what may stand after it.
        number (`Callable[[str], float]`): the number that a value stands for.
        other (`str`): pattern of a value in other words, which takes the verdict back if it follows.
    """

    word: str
    value: str
    number: Callable[[str], float]
    other: str

    @property
    def label(self) -> str:
        """Pattern of "Score:", "score =", "**Score**:", not of "Scores:" or "Underscore:"."""
        return rf"(?<![^\W_]){self.word}[*_`\"]{{0,3}}[^\S\n]*[:=：]{{1,2}}"

    def match(self, text: str) -> re.Match[str] | None:
        """The value with which a text begins, perhaps in brackets, emphasis or \\boxed{}."""
        return re.match(_OPENING + rf"(?P<value>{self.value})", text, re.IGNORECASE)

    def option(self, text: str) -> str | None:
        """The value, if it is all that stands between two verdicts of a list: "1 or", "1, "."""
        found = re.fullmatch(rf"\W*?({self.value})[\W_]*(?:or|and|to)?[\W_]*", text, re.IGNORECASE)
        return found[1] if found else None

    def mentions(self, line: str) -> bool:
        """Whether a line speaks of a verdict with a value."""
        return re.search(rf"(?<![^\W_]){self.word}s?(?![^\W_])", line, re.IGNORECASE) is not None and self.changes(line)

    def changes(self, text: str) -> bool:
        """Whether another value may stand in a text."""
        return any(sign.isnumeric() for sign in text) or re.search(self.other, text, re.IGNORECASE) is not None


SCORE = Form(
    "score",
    r"[-+\u2212]?[^\S\n]*(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+\u2212]?[0-9]+)?",
    lambda value: float("".join(value.split()).replace("\u2212", "-")),
    r"(?!)",
)


def _choice(value: str) -> float:
    last = value.split()[-1].casefold()
    return {"1": 1.0, "2": -1.0, "tie": 0.0}[last]


CHOICE = Form("verdict", r"(?:answer\s+)?(?:[12]|tie)(?!\w)", _choice, r"\b(?:tie[ds]?|draw|both|equal\w*|neither)\b")


def read_verdict(answer: str, question: str = "") -> float | None:
    """
    The score in a judge's answer.

    Args:
        answer (`str`): a whole answer, not one that was cut. Thoughts up to `</think>` or the like do not count.
        question (`str`, *optional*): what the judge was asked. An instruction that it repeats is not a verdict.

    Returns:
        `float`, *optional*: the number that is written, exactly; `None` if there is none, or it is in doubt.
    """
    return read_form(answer, question, SCORE)


def read_choice(answer: str, question: str = "") -> int | None:
    """
    The choice between two answers in a judge's answer, which ends with "Verdict: 1", "Verdict: 2" or "Verdict: tie".

    Args:
        answer, question (`str`): see [`read_verdict`].

    Returns:
        `int`, *optional*: 1 if the first is better, -1 if the second is, 0 for a tie; `None` if it is in doubt.
    """
    found = read_form(answer, question, CHOICE)
    return None if found is None else int(found)


def read_form(answer: str, question: str, form: Form) -> float | None:
    """A verdict of some form; see [`read_verdict`]."""
    text = _THOUGHT_END.split(answer)[-1]
    if _THOUGHT.search(text):
        return None  # it has not come to an end of its thoughts
    if found := _OBJECT.search(text):
        score = _from_json(found[1], form)
        return None if score is None or _repeats(text, found.start(1), question, r"\{") else score
    labels = list(re.finditer(form.label, text, re.IGNORECASE))
    if not labels:
        return None
    score, end = _at(text, labels[-1], form)
    if score is None or _is_mentioned(text[end:], form) or _repeats(text, labels[-1].start(), question, form.label):
        return None
    if len(labels) > 1:  # scores one after the other are a list of what may be written
        option = form.option(text[labels[-2].end() : labels[-1].start()])
        if option and form.number(option) != score:
            return None
    return score


def _at(text: str, label: re.Match[str], form: Form) -> tuple[float | None, int]:
    """The number after a label, if that is a verdict, and where its line ends."""
    start = text.rfind("\n", 0, label.start()) + 1
    before = _BEFORE.fullmatch(text[start : label.start()])
    end = _line_end(text, label.end())
    tail = text[label.end() : end]
    alone = not tail.strip(" \t\r*_`")
    if alone:  # the number stands on the next line
        skipped = len(text[end:]) - len(text[end:].lstrip())
        end = _line_end(text, end + skipped)
        tail = text[label.end() : end].strip(" \t\r\n*_`")
    number = form.match(tail)
    if (
        before is None or _SUPPOSED.search(before[0]) or number is None or (alone and re.match(r"[-+*]\s", tail))
    ):  # a list's item is not a sign
        return None, end
    if _WITHDRAWN.search(tail[number.end() :] + text[end:]):
        return None, end
    rest = _without_closing(tail[number.end() :], number["open"].removeprefix("\\boxed"), before["quote"])
    if rest is None or not (_ends(rest) or (_explains(rest, form) and not alone and not before["quote"])):
        return None, end
    score = form.number(number["value"])
    return score if math.isfinite(score) else None, end


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _without_closing(rest: str, opened: str, quote: str) -> str | None:
    """What follows a number after the ends of emphasis, brackets and quotation; `None` where one of them is missing."""
    rest = rest.lstrip("*_`")
    for sign in [*reversed(opened), quote]:
        if not rest.startswith(_CLOSING[sign]):
            return None
        rest = rest.removeprefix(_CLOSING[sign]).lstrip("*_`")
    return rest


def _ends(rest: str) -> bool:
    return _END.fullmatch(rest) is not None


def _explains(rest: str, form: Form) -> bool:
    """Whether a text after a number only says why it is given, and does not change it."""
    return _SENTENCE.match(rest) is not None and not form.changes(rest) and _SCALE.search(rest) is None


def _is_mentioned(text: str, form: Form) -> bool:
    """Whether a line speaks of a verdict with a value again."""
    return any(form.mentions(line) for line in text.splitlines())


def _from_json(text: str, form: Form) -> float | None:
    """The verdict of a JSON object: its number "score", or its "verdict"."""
    try:
        found: Any = json.loads(text)
        values = [value for name, value in found.items() if name.casefold() == form.word]
        if len(values) != 1:
            return None
        if form is CHOICE:
            said = str(values[0]) if type(values[0]) in (int, str) else ""
            return form.number(said) if re.fullmatch(form.value, said, re.IGNORECASE) else None
        return float(values[0]) if type(values[0]) in (int, float) and math.isfinite(values[0]) else None
    except (ValueError, OverflowError):
        return None


def _repeats(answer: str, place: int, question: str, label: str) -> bool:
    """Whether what leads to a score stands in the question as well, and is not a whole sentence."""
    words = _plain(answer[:place])
    if len(words) < QUOTED or words.endswith((".", "!", "?")):
        return False
    starts = (found.start() for found in re.finditer(label, question, re.IGNORECASE))
    return any(_plain(question[:start]).endswith(words[-QUOTED:]) for start in starts)


def _plain(text: str) -> str:
    """A text without emphasis, quotation marks and differences of case and white space."""
    return " ".join(re.sub(r"[*_`\"'“”‘’]", "", text).casefold().split())

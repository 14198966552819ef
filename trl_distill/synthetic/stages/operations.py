"""Operations that rewrite prompts (Evol-Instruct, arXiv 2304.12244): texts with `{prompt}`, and what may go wrong.

The built-in ones are the files in `synthetic/operations/`; users add files of their own. Whether a rewrite can be used
is decided by rules here, without a model. Asking for it is left to `evolve.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..records import Answer
from ..text import numbers, words
from .rewriting import answer_text


FOLDER = Path(__file__).parent.parent / "operations"


BUILT_IN = ("deeper", "constraints", "concrete", "breadth", "other_words")


COPIED = 8  # words in a row of the operation's own text that no prompt has by chance


LEAKS = re.compile(
    r"(given|rewritten|created|original|evolved) prompt\b|prompt (rewriter|creator)\b|"
    r"#\s*(the )?(given|rewritten|created|new|original)\b",
    re.IGNORECASE,
)


_MATERIAL = (
    "passage|text|article|document|table|image|picture|photo|file|code|paragraph|data|dataset|figure|graph|chart|"
    "diagram|excerpt|snippet|list|sentence|sentences|conversation|email|poem|story"
)


APOLOGY = re.compile(  # the rewriter speaks as an assistant instead of rewriting
    r"^\W*(i('m| am)( (so|very|really))? sorry|sorry\b|i apologi[sz]e|my apologies|unfortunately, i\b)|"
    r"\bas an ai\b|\bi (cannot|can't|can not|am unable to|am not able to|won't) "
    r"(help|assist|rewrite|create|provide|fulfil|fulfill|comply|generate|do|continue|process|see|access)\b",
    re.IGNORECASE,
)


ASKS_BACK = re.compile(
    r"\b(please|could you|can you|kindly)( please)? (provide|share|paste|send|give|clarify|specify)( me)?( with)? "
    r"(the|your|a|more) (prompt|original|actual)\b|"
    r"\bso (that )?i can (rewrite|help|assist|create|proceed|provide)\b|"
    r"\bi('d| would|'ll| will) be (happy|glad|delighted) to\b|"
    r"\b(no|the) (prompt|text|input) (was|has been|is) (not )?(given|provided)\b|"
    r"\byou('d| would)? (like|want) me to rewrite\b",
    re.IGNORECASE,
)


PLACEHOLDER = re.compile(r"[\[<{](insert|your|paste|add|placeholder|enter|fill)\b[^\]>}]*[\]>}]", re.IGNORECASE)


ATTACHED = re.compile(rf"\b(attached|accompanying|enclosed) ({_MATERIAL})\b", re.IGNORECASE)


POINTS = re.compile(  # to something that should stand beside it
    rf"\b(provided|given|above|following|below) ({_MATERIAL})\b|\b({_MATERIAL}) (provided|given|above|below)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Operation:
    """
    One way to rewrite a prompt.

    Attributes:
        name (`str`): as the column `evolution` lists it.
        template (`str`): the request to the rewriter; `{prompt}` stands for the prompt.
    """

    name: str
    template: str

    def question(self, prompt: str, before: str) -> str:
        """
        What the rewriter is asked.

        Args:
            prompt (`str`): to be rewritten; of messages the last one.
            before (`str`): the conversation before it, or nothing.
        """
        lead = f"The conversation before the prompt, which stays as it is:\n\n{before}\n\n" if before else ""
        return lead + self.template.replace("{prompt}", prompt)

    @property
    def headers(self) -> list[str]:
        """The lines of the template that mark its parts, such as `#Given Prompt#:`, the last one last."""
        return [line.strip() for line in self.template.splitlines() if re.fullmatch(r"#[^#]+#:?", line.strip())]

    def read(self, answer: Answer, parent: str, continues: bool) -> tuple[str, str | None]:
        """
        The rewrite in an answer, and why it cannot be used (or `None`).

        Args:
            answer (`list[Completion]` or `Refusal`): of the rewriter.
            parent (`str`): what was to be rewritten.
            continues (`bool`): whether the rewriter continues text: then it may go on with the next part of the
                template, where the rewrite ends.
        """
        text, fault = answer_text(
            answer, [re.escape(header.rstrip(":")) for header in self.headers] if continues else []
        )
        text = self._bare(text)
        return text, fault or self._fault(text, parent)

    def _bare(self, text: str) -> str:
        """Without the template's last header, if the answer repeats it, and without quotes around everything."""
        if self.headers and text.casefold().startswith(last := self.headers[-1].rstrip(":").casefold()):
            text = text[len(last) :].removeprefix(":").strip()
        for left, right in ('""', "“”"):
            inner = text[1:-1]
            if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
                return inner.strip()
        return text

    def _fault(self, text: str, parent: str) -> str | None:
        if not any(character.isalnum() for character in text):
            return "empty"
        if self._leaks(text, parent):
            return "the instruction leaked"
        if why := unanswerable(text, parent):
            return f"unanswerable: {why}"
        return closeness(text, parent)

    def _leaks(self, text: str, parent: str) -> bool:
        """Whether words of the instruction stand in the rewrite that do not come from the prompt."""
        if any(found.group().casefold() not in parent.casefold() for found in LEAKS.finditer(text)):
            return True
        own = set().union(*(_runs(part) for part in self.template.split("{prompt}")))
        return bool((_runs(text) & own) - _runs(parent))


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `COPIED` words."""
    found = _plain_words(text)
    return {tuple(found[i : i + COPIED]) for i in range(len(found) - COPIED + 1)}


def _plain_words(text: str) -> list[str]:
    """Lower-case words without punctuation around them."""
    return [bare for word in words(text) if (bare := word.strip(string.punctuation + "“”‘’«»。、，？！"))]


def unanswerable(text: str, parent: str) -> str | None:
    """
    Why nobody could answer a rewrite, as far as a rule can see it, or `None`. What the parent says as well is no
    fault of the rewrite.
    """
    rules = (
        (APOLOGY, "an apology"),
        (ASKS_BACK, "asks for the prompt"),
        (PLACEHOLDER, "a placeholder"),
        (ATTACHED, "speaks of something that is not given"),
    )
    for pattern, why in rules:
        if pattern.search(text) and not pattern.search(parent):
            return why
    missing = text.endswith(":") and not parent.rstrip().endswith(":")
    has_material = "\n" in text or re.search(r"[\"“`«:]", text)
    if missing or (POINTS.search(text) and not POINTS.search(parent) and not has_material):
        return "speaks of something that is not given"
    return None


def closeness(text: str, parent: str) -> str | None:
    """
    Whether a rewrite is its parent again: the same words, or at most two and a fifth of them exchanged, added or left
    out. Texts that name different numbers ask for different things.
    """
    ours, theirs = _plain_words(text), _plain_words(parent)
    if ours == theirs:
        return "equal to the parent"
    if numbers(text) != numbers(parent):
        return None
    counts = Counter(ours), Counter(theirs)
    changed = max((counts[0] - counts[1]).total(), (counts[1] - counts[0]).total())
    return "nearly equal to the parent" if changed <= min(2, 0.2 * max(len(ours), len(theirs))) else None


def load_operations(names: list[str] | str | None) -> list[Operation]:
    """
    The operations that the settings name, in their order; all built-in ones for `None`. A single one may be text.

    Raises:
        ValueError: a file is not there or has no `{prompt}`, or two different ones have the same name.
    """
    given = [names] if isinstance(names, str) else names
    found = [_load(name) for name in given or BUILT_IN]
    for one in found:
        other = next(other for other in found if other.name == one.name)
        if other != one:
            raise ValueError(
                f"Two operations of `evolve_operations` are called {one.name!r}, so the column `evolution` would not "
                "tell them apart. Rename one of the files."
            )
    return found


def _load(name: str) -> Operation:
    path = FOLDER / f"{name}.txt" if name in BUILT_IN else Path(name)
    if not path.is_file():
        raise ValueError(
            f"`evolve_operations` names {name!r}, which is neither a built-in operation ({', '.join(BUILT_IN)}) nor a "
            "file."
        )
    template = path.read_text(encoding="utf-8").strip()
    if "{prompt}" not in template:
        raise ValueError(f"The operation {name!r} does not show the prompt. Put `{{prompt}}` where it belongs.")
    return Operation(path.stem, template)

"""Which language a text is in, by py3langid: naive Bayes over byte n-grams, with its model in the package.

Short texts are not decided on, nor those of which the classifier is unsure. What becomes of a row is left to the
caller.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from functools import cache
from typing import Any

from ..text import Text, content


LETTERS = 40  # below which nothing is decided; signs of scripts that write a word in one or two count double


CONFIDENCE = 0.5  # probability of a language below which nothing is decided


LONGEST = 10_000  # characters that are looked at


_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|https?://\S+|<[^<>\n]{1,200}>",
    re.DOTALL,
)


_DENSE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")  # kana, Han, Hangul


def check_language(codes: Collection[str]) -> None:
    """
    Raises:
        ValueError: languages are to be told apart, and py3langid is not installed or does not know one of them.
    """
    if not codes:
        return
    if importlib.util.find_spec("py3langid") is None:
        raise ValueError(
            "`language` needs py3langid: install it with `pip install 'trl_distill[language]'`, or leave `language` "
            "out."
        )
    if unknown := sorted(set(codes) - set(_identifier().labels)):
        raise ValueError(
            f"py3langid does not know the language {', '.join(map(repr, unknown))}. It knows: "
            f"{', '.join(sorted(_identifier().labels))}."
        )


def language_of(text: str) -> str | None:
    """
    The ISO 639 code of a text's language; `None` where it cannot be decided.

    Code, formulas, tags and links are left out first. The rest must have `LETTERS` letters, and the language a
    probability of `CONFIDENCE`.
    """
    prose = _NOT_PROSE.sub(" ", text[:LONGEST])
    letters = sum(sign.isalpha() for sign in prose) + len(_DENSE.findall(prose))
    if letters < LETTERS:
        return None
    code, probability = _identifier().classify(" ".join(prose.split()))
    return code if probability >= CONFIDENCE else None


def language_fault(prompt: Text, completion: str, codes: Collection[str]) -> str | None:
    """Why a row is not in one of these languages, or `None`."""
    asked = prompt if isinstance(prompt, str) else "\n".join(map(content, prompt))
    for name, text in (("prompt", asked), ("completion", completion)):
        found = language_of(text)
        if found is not None and found not in codes:
            return f"{name} in another language ({found})"
    return None


@cache
def _identifier() -> Any:
    """The classifier, loaded once: 0.7 seconds."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

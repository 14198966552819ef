"""Prompts that SmolLM2-135M can answer: six templates filled with common words, and some capitals.

The words are tokens of the model's own vocabulary, which is ordered by frequency. Two templates have a verifier. Words
of the held-out prompts are not in the training prompts; capitals are not in them at all, so they show what knowledge
survives.
"""

from __future__ import annotations

import random
import re
from typing import Any

from datasets import Dataset


TEMPLATES = {
    "sentence": 'Use the word "{}" in a sentence.',
    "letter": 'What is the first letter of the word "{}"?',
    "meaning": 'What does the word "{}" mean?',
    "fact": "Write one sentence about {}.",
    "things": 'Name three things that are related to "{}".',
    "question": 'Write a question with the word "{}" in it.',
}


VERIFIED = ("sentence", "letter")


CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Canada": "Ottawa",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "India": "Delhi",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Cuba": "Havana",
    "China": "Beijing",
    "Russia": "Moscow",
    "Sweden": "Stockholm",
    "Austria": "Vienna",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "Chile": "Santiago",
    "Poland": "Warsaw",
    "Germany": "Berlin",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Hungary": "Budapest",
    "Turkey": "Ankara",
    "Lebanon": "Beirut",
    "Syria": "Damascus",
    "Afghanistan": "Kabul",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
}


HELD_OUT_WORDS = 300


def words(tokenizer: Any, count: int = 3000) -> list[str]:
    """Common words, in an order that is random and always the same."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    known = set(tokens)
    whole = (re.fullmatch("Ġ([a-z]{4,9})", token) for token in tokens)
    spelt = [match[1] for match in whole if match]
    found = [word for word in spelt if f"Ġ{word.capitalize()}" in known][:count]  # otherwise many are pieces of words
    random.Random(0).shuffle(found)
    return found


def training_prompts(tokenizer: Any, size: int, seed: int) -> Dataset:
    """`size` prompts without repetition, of all templates in turn."""
    draw = random.Random(seed)
    known = words(tokenizer)[HELD_OUT_WORDS:]
    if size > len(known) * len(TEMPLATES):
        raise ValueError(f"There are only {len(known) * len(TEMPLATES)} prompts.")
    pairs = [(kind, word) for kind in TEMPLATES for word in known]
    return _dataset(draw.sample(pairs, size))


def held_out(tokenizer: Any, size: int, kinds: tuple[str, ...] = tuple(TEMPLATES)) -> Dataset:
    """`size` prompts with words that training never shows."""
    known = words(tokenizer)[:HELD_OUT_WORDS]
    return _dataset([(kinds[i % len(kinds)], known[i // len(kinds)]) for i in range(size)])


def capitals() -> Dataset:
    """A question for each capital."""
    rows = [_row("capital", country, f"What is the capital of {country}?") for country in CAPITALS]
    return Dataset.from_list(rows)


def right(text: str, kind: str, word: str) -> float:
    """1.0 for a right answer to a question with a verifier, else 0.0."""
    if kind == "sentence":
        return float(re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None)
    if kind == "capital":
        return float(CAPITALS[word] in text)
    named = re.findall(r"[\"'“*]([A-Za-z])[\"'”*.]", text)  # letters between quotation marks
    return float(bool(named) and named[-1].lower() == word[0])


def correct(completions: list[Any], kind: list[str], word: list[str], **_: Any) -> list[float | None]:
    """Reward function: 1.0 where a question with a verifier is answered well, else 0.0; `None` without a verifier."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    rows = zip(texts, kind, word, strict=True)
    return [right(text, what, name) if what in (*VERIFIED, "capital") else None for text, what, name in rows]


def _dataset(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_list([_row(kind, word, TEMPLATES[kind].format(word)) for kind, word in pairs])


def _row(kind: str, word: str, text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "kind": kind, "word": word}

"""What the example asks: prompts of two kinds, labelled pairs for the check of the judge, and the judge's question."""

from __future__ import annotations

from typing import Any

from scripts.studies.pretrained.prompts import CAPITALS


ASKED = 12  # capitals that are asked for; the others are in the labelled pairs


OPEN = [
    "Why is the sky blue?",
    "Name three animals that can fly.",
    "How do I boil an egg?",
    "What does a doctor do?",
    "Give me one reason to learn a language.",
    "What can I cook with rice and beans?",
    "Write a sentence about the sea.",
    "Why do people sleep?",
    "What is a volcano?",
    "Give me a tip for a good photo.",
    "What is the difference between a cat and a dog?",
    "How does a bicycle work?",
]


JUDGE_PROMPT = """Which answer to the question "{prompt}" is right?
Verdict: 1 - {first}
Verdict: 2 - {second}
Repeat the line of the right answer, starting with "Verdict:".
"""


MORE = " It is a large city with a long history, and many people visit it every year."


def prompts() -> list[dict[str, Any]]:
    """24 prompts: capitals, whose right answer is in the column `answer`, and open questions, where it is `None`."""
    known = [(f"What is the capital of {country}?", capital) for country, capital in list(CAPITALS.items())[:ASKED]]
    asked = [*known, *((text, None) for text in OPEN)]
    return [{"prompt": [{"role": "user", "content": text}], "answer": answer} for text, answer in asked]


def labelled_pairs() -> list[dict[str, Any]]:
    """
    20 pairs of a right and a wrong answer, of which 7 are of equal form, in 7 the right one is longer, and in 6 the
    wrong one is.
    """
    rows = list(CAPITALS.items())[ASKED:]
    made = []
    for i, (country, capital) in enumerate(rows):
        wrong = rows[(i + 7) % len(rows)][1]
        chosen, rejected = (f"The capital of {country} is {city}." for city in (capital, wrong))
        longer = ("", MORE)[i % 3 == 1], ("", MORE)[i % 3 == 2]
        asked = [{"role": "user", "content": f"What is the capital of {country}?"}]
        made.append({"prompt": asked, "chosen": chosen + longer[0], "rejected": rejected + longer[1]})
    return made

"""Human data: every usual shape, and exactly the share that was asked for."""

from __future__ import annotations

import pytest

from trl_distill.data.json_rows import InputRow
from trl_distill.synthetic.stages.human import human_needed, mixed, read_human


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        ({"prompt": "q", "completion": "a", "x": 1}, True, {"prompt": "q", "completion": "a"}),
        ({"prompt": "q", "completion": "a"}, False, {"prompt": [USER], "completion": [ASSISTANT]}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, False, {"prompt": [USER], "completion": [ASSISTANT]}),
        ({"messages": [USER, ASSISTANT]}, False, {"prompt": [USER], "completion": [ASSISTANT]}),
        ({"messages": [USER, ASSISTANT]}, True, "messages, where the teachers' prompts are text"),
        ({"messages": [USER]}, False, "empty prompt"),
        ({"messages": [USER, USER]}, False, "completion is not one message of the assistant"),
        ({"prompt": "q", "completion": " "}, True, "empty completion"),
        ({"prompt": "q", "completion": None}, True, "empty completion"),
        ({"prompt": "q", "completion": [ASSISTANT]}, False, "prompt and completion are not both text or both messages"),
        ({"text": "q"}, True, "no columns `prompt` and `completion`, nor `messages`"),
    ],
)
def test_shapes(row, text, expected):
    assert read_human(InputRow("row 1", row), text) == expected


def test_needed():
    assert [human_needed(80, 0.2), human_needed(0, 0.5), human_needed(3, 0.5)] == [20, 0, 3]


@pytest.mark.parametrize(("count", "available", "take"), [(50, 30, 20), (0, 5, 5), (7, 0, 0), (10, 10, 10)])
def test_mixing_takes_exactly_what_was_asked(count, available, take):
    ours = [{"n": i} for i in range(count)]
    theirs = [{"n": -1 - i} for i in range(available)]
    rows = [row["n"] for row in mixed(ours, count, theirs, available, take, seed=3)]
    assert [n for n in rows if n >= 0] == list(range(count))  # in their order
    human = [n for n in rows if n < 0]
    assert len(human) == len(set(human)) == take
    assert rows == [row["n"] for row in mixed(ours, count, theirs, available, take, seed=3)]


def test_mixing_chooses_and_places_evenly():
    chosen, places = [0] * 10, [0] * 10
    for seed in range(2000):
        rows = mixed([{"n": -1}] * 5, 5, [{"n": i} for i in range(10)], 10, 5, seed)
        for place, row in enumerate(rows):
            if row["n"] >= 0:
                chosen[row["n"]] += 1
                places[place] += 1
    assert all(abs(count - 1000) < 120 for count in chosen + places)  # five standard deviations

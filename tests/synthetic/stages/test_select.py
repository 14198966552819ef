"""Filters by length, stop reason and repetition; selection by score; pairs."""

from __future__ import annotations

import pytest

from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.records import Candidate
from trl_distill.synthetic.stages.select import filter_fault, pair_of, pair_row, selection_faults


def config(**changes):
    settings = {"dataset_name": "p", "output_dir": "o", "teacher_model_name_or_path": "t", "reward_funcs": ["f"]}
    return GenerateConfig(**{**settings, **changes})


def candidate(text="fine", stop="stop", score=None, prompt="q"):
    return Candidate(prompt, text, stop, "t", score, {"answer": "a"})


@pytest.mark.parametrize(
    ("made", "changes", "fault"),
    [
        (candidate(), {}, None),
        (candidate(" "), {"min_characters": 0}, "empty"),
        (candidate(stop="length"), {}, "cut off at the length limit"),
        (candidate(stop="length"), {"keep_truncated": True}, None),
        (candidate(stop="content_filter"), {"keep_truncated": True}, "ended by 'content_filter'"),
        (candidate("abc"), {"min_characters": 4}, "fewer than 4 characters"),
        (candidate("abcd"), {"min_characters": 4, "max_characters": 4}, None),
        (candidate("abcde"), {"max_characters": 4}, "more than 4 characters"),
        (candidate("so it is and " * 20), {}, "more than 30% repeated word 4-grams"),
        (candidate("so it is and " * 20), {"max_repetition": 1.0}, None),
    ],
)
def test_filters(made, changes, fault):
    assert filter_fault(made, config(**changes)) == fault


def test_selection():
    scored = [candidate(score=s) for s in (0.5, 1.0, 0.2, 1.0)]
    assert selection_faults(scored, config(keep="all")) == [None] * 4
    assert [f is None for f in selection_faults(scored, config(keep="correct"))] == [False, True, False, True]
    assert [f is None for f in selection_faults(scored, config(keep="best"))] == [False, True, False, False]
    assert [f is None for f in selection_faults(scored, config(keep="correct", correct_from=0.5))] == [
        *(True, True, False, True)
    ]
    assert selection_faults([], config(keep="best")) == []


@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([0.2, 0.9, 0.9, 0.1, 0.1], "all", (1, 3)),
        ([0.0, 1.0], "correct", (1, 0)),
        ([1.0], "all", "fewer than two completions left"),
        ([1.0, 1.0], "all", "all scores are equal"),
        ([0.2, 0.9], "correct", "no score of 1 or more"),
        ([1.0, 2.0], "correct", "no score below 1"),
    ],
)
def test_pairs(scores, keep, expected):
    made = [candidate(text=str(i), score=s) for i, s in enumerate(scores)]
    found = pair_of(made, config(keep=keep, pairs=True, completions_per_prompt=2))
    assert found == expected if isinstance(expected, str) else found == tuple(made[i] for i in expected)


def test_rows_have_the_shape_of_their_prompt():
    chat = [{"role": "user", "content": "q"}]
    assert candidate("x", score=1.0).as_row(True) == {
        **{"prompt": "q", "completion": "x", "answer": "a", "teacher": "t", "score": 1.0}
    }
    assert candidate("x", prompt=chat).as_row(False)["completion"] == [{"role": "assistant", "content": "x"}]
    row = pair_row(candidate("x", score=1.0, prompt=chat), candidate("y", score=0.0, prompt=chat))
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("x", "y")
    assert (row["chosen_score"], row["rejected_score"], row["answer"]) == (1.0, 0.0, "a")

"""Costs beside the update: the page is made of the files, and the scripts measure what they say."""

from __future__ import annotations

import json
import random

import pytest
import torch

from scripts.studies.benchmark import costs, estimator_heads, served_answers, start_up
from trl_distill.teachers.answer_arrays import Row, read_good_answer


def test_the_page_is_made_of_the_files():
    page = costs.PAGE.read_text()
    assert costs.written(page) == page
    for make in costs.TABLES.values():
        assert make() in page


def test_what_is_asked_stands_beside_what_was_measured():
    assert [costs.bar(value, 0.5) for value in (0.4, 0.6)] == ["≤ 0.5 ✓", "≤ 0.5 ✗"]
    assert costs.bar(1.0, None) == ""


@pytest.mark.parametrize("k", [1, 5])
def test_the_answer_that_is_timed_is_read_at_once(k):
    """Else the slow way would be timed under its name."""
    rows = [Row(number, [7, 9, 11], [1, 2]) for number in range(2)]
    content = served_answers.answer(rows, k, random.Random(0))
    found = read_good_answer(content, rows, "teacher", k)
    assert found is not None
    assert found.top_ids.shape == (4, k)
    first = json.loads(content)["choices"][0]["prompt_logprobs"][1]["9"]
    assert found.log_p[0] == first["logprob"]


@pytest.mark.parametrize("rewarded", [False, True])
def test_estimators_are_timed_without_a_second_projection(monkeypatch, rewarded):
    """In miniature: every backward pass finds the gradient that it expects."""
    from trl_distill.heads import few_ids, fused

    def never(*_, **__):
        raise AssertionError("projected again")

    monkeypatch.setattr(few_ids, "_add_gradients", never)
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *a: run(*a) if a[2] is not None else never())
    found = estimator_heads.measure(6, 97, rewarded, repeats=1)
    assert set(found["ratio"]) == {"full", "topk", "sampled"}
    assert all(len(times) == 1 for times in found["seconds"].values())
    assert torch.tensor(list(found["ratio"].values())).isfinite().all()


def test_commands_are_the_ones_that_users_type(tmp_path):
    made = start_up.commands(tmp_path)
    assert made["trl-distill --help"][-1] == "--help"
    assert "--max_steps" in made[start_up.FIRST_STEP]
    assert (tmp_path / "prompts.jsonl").read_text().count("\n") == 32

"""Reward functions of every form that TRL takes, the scores that they may return, and the text that they get."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import EOS, PAD, WORDS, config, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from trl_distill import OPDTrainer
from trl_distill.data.rewards import as_score, call_reward, checked_reward, import_reward, scores
from trl_distill.data.sampling import SampledCompletion, answer_texts
from trl_distill.reporting.evaluation import Answer, summarise
from trl_distill.reporting.evaluation_table import as_json


LETTERS = WORDS[2:]


def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def lengths_later(completions, **kwargs):
    await asyncio.sleep(0)
    return lengths(completions)


class Lengths:
    def __call__(self, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("seen", completions)
        log_metric("calls", 1.0 + trainer_state.global_step)
        return lengths(completions)


class LengthsLater:
    async def __call__(self, completions, **kwargs):
        return await lengths_later(completions)


class OfOneLoop:
    """As a function that keeps a connection open: it fails on another event loop than its first."""

    loop = None

    async def __call__(self, completions, **kwargs):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        return lengths(completions)


FORMS = {
    "function": lengths,
    "async function": lengths_later,
    "instance": Lengths(),
    "async instance": LengthsLater(),
    "instance with a connection": OfOneLoop(),
    "partial": functools.partial(lengths, scale=1),
    "partial of an async one": functools.partial(lengths_later, scale=1),
    "lambda around an async one": lambda completions, **kwargs: lengths_later(completions),
    "without keyword arguments": lambda completions: lengths(completions),
    "method": Lengths().__call__,
    "array": lambda completions, **_: np.array(lengths(completions)),
    "column of an array": lambda completions, **_: np.array(lengths(completions))[:, None],
    "integers": lambda completions, **_: [len(text) for text in completions],
    "integer array": lambda completions, **_: np.array([len(text) for text in completions]),
    "tensor": lambda completions, **_: torch.tensor(lengths(completions), requires_grad=True),
    "bf16 tensor": lambda completions, **_: torch.tensor(lengths(completions), dtype=torch.bfloat16),
    "list of tensors": lambda completions, **_: [*torch.tensor(lengths(completions))],
    "tuple": lambda completions, **_: tuple(lengths(completions)),
    "series": lambda completions, **_: pd.Series(lengths(completions), index=[5, 3]),
    "generator": lambda completions, **_: (float(len(text)) for text in completions),
}


def written(*texts: str) -> list[SampledCompletion]:
    return [SampledCompletion({"prompt": "a", "answer": "b"}, [2], ids_of(text), False) for text in texts]


def ids_of(text: str) -> list[int]:
    return [*(WORDS.index(word) for word in text.split()), EOS]


@pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)
def test_every_form_of_a_reward_function(function, tokenizer):
    for _ in range(2):
        (found,) = scores(written("a b c", "d"), [function], tokenizer).values()
        assert found == [5.0, 1.0]
        assert all(type(score) is float for score in found)


def test_an_async_function_where_a_loop_runs_already(tokenizer):
    async def notebook():
        return scores(written("a"), [lengths_later], tokenizer)

    assert asyncio.run(notebook()) == {"lengths_later": [1.0]}


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (True, 1.0),
        (False, 0.0),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([True]), 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 2), 0.5),
        (None, None),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (1e39, None),  # infinite in fp32, as training keeps it
        (10**400, None),
        (np.nan, None),
        (np.float16("inf"), None),
        (torch.tensor(math.nan), None),
        (torch.tensor([1.0, 2.0]), None),
        (np.array([]), None),
        (Decimal("sNaN"), None),
        (pd.NA, None),
        (pd.NaT, None),
        ("0.5", None),
        (np.str_("0.5"), None),
        (np.array("0.5"), None),
        (b"1", None),
        ("right", None),
        (1j, None),
        (np.complex128(1), None),
        ([1.0], None),
        ({"score": 1.0}, None),
        pytest.param(object(), None, id="object"),
    ],
    ids=repr,
)
def test_what_is_not_a_finite_number_is_no_score(value, score, tokenizer):
    assert as_score(value) == score
    (found,) = scores(written("a", "b"), [lambda completions, **_: [value, 2.0]], tokenizer).values()
    assert found == [score, 2.0]


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.floats(), st.booleans(), st.none(), st.integers(), st.text(), st.decimals(), st.complex_numbers()
            ),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_returned_the_results_are_json(returned):
    by_function = [
        call_reward(lambda completions, i=i: returned[i], 2, {"completions": ["a", "b"]}) for i in range(len(returned))
    ]
    for given_scores, values in zip(by_function, returned, strict=True):
        assert given_scores == [as_score(value) for value in values]
    known = [[score for score in row if score is not None] for row in zip(*by_function, strict=True)]
    totals = [sum(row) if row else None for row in known]
    answers = [Answer(i, (EOS,), total, False) for i, total in enumerate(totals)]
    found = {name: as_json(one) for name, one in summarise(answers).items()}
    json.dumps({"scores": totals, "estimates": found}, allow_nan=False)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"returned \[1.0\] for 2 completions"),
        (None, "returned None for 2 completions"),
        ("ab", "returned 'ab' for 2"),
        ({"a": 1, "b": 2}, "returned {'a': 1, 'b': 2} for 2"),
        (1.0, "failed: TypeError"),
        (np.array(1.0), "failed: TypeError"),
    ],
    ids=repr,
)
def test_a_wrong_number_of_scores_is_an_error(returned, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        scores(written("a", "b"), [lambda completions, **_: returned], tokenizer)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [([[1.0], [0.0]], "list"), ([(1.0, {}), (0.0, {})], "tuple"), ([{"score": 1}] * 2, "dict"), (["1", "0.5"], "str")],
    ids=repr,
)
def test_scores_that_are_dropped_are_named_once(returned, kind, tokenizer, caplog):
    def odd(completions, **kwargs):
        return returned

    for _ in range(2):
        assert scores(written("a", "b"), [odd], tokenizer) == {"odd": [None, None]}
    (record,) = [one for one in caplog.records if "'odd'" in one.message]
    assert f"such as {returned[0]!r} of type {kind}" in record.message


def test_none_and_nan_are_dropped_without_a_warning(tokenizer, caplog):
    scores(written("a", "b"), [lambda completions, **_: [None, math.nan]], tokenizer)
    assert "finite" not in caplog.text


def test_a_set_is_refused(tokenizer):
    with pytest.raises(ValueError, match="returned a set"):
        scores(written("a", "b"), [lambda completions, **_: {1.0, 0.0}], tokenizer)


def test_an_async_function_that_fails_is_named(tokenizer):
    async def torn(completions, **kwargs):
        raise KeyError("answers")

    with pytest.raises(ValueError, match=r"'torn' failed: KeyError: 'answers'. It was given the columns answer"):
        scores(written("a"), [torn], tokenizer)


def test_functions_of_the_same_name_are_kept_apart(tokenizer):
    def other():
        def lengths(completions, **kwargs):
            return [0.0 for _ in completions]

        return lengths

    found = scores(written("a"), [lengths, other(), functools.partial(lengths), Lengths(), Lengths()], tokenizer)
    assert found == {"lengths": [1.0], "lengths 2": [0.0], "lengths 3": [1.0], "Lengths": [1.0], "Lengths 2": [1.0]}


def test_columns_of_all_rows_are_passed(tokenizer):
    rows = written("a", "b")
    rows[1].row["other"] = 3
    seen = {}
    scores(rows, [lambda completions, **kwargs: seen.update(kwargs) or [None, None]], tokenizer)
    assert (seen["answer"], seen["other"]) == (["b", "b"], [None, 3])


def test_a_class_is_made_into_an_instance(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_classes.py").write_text(
        "class Later:\n    async def __call__(self, completions, **_):\n        return [2 for _ in completions]\n"
        "class Asking:\n    def __init__(self, url):\n        pass\n"
        "made = Later()\nnumber = 3\n"
    )
    for name in ("Later", "made"):
        assert scores(written("a"), [import_reward(f"my_classes.{name}")], tokenizer) == {"Later": [2.0]}
    with pytest.raises(ValueError, match="is a class that cannot be made without arguments"):
        import_reward("my_classes.Asking")
    with pytest.raises(ValueError, match="is 3, which cannot be called"):
        import_reward("my_classes.number")


# -- the text that they get ------------------------------------------------------------------------------------------


@pytest.fixture
def thinking():
    """A tokenizer with special tokens for thoughts: all of its words."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": LETTERS})
    assert tokenizer.decode([2, 3, EOS], skip_special_tokens=True) == ""
    return tokenizer


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([2, 3, 4, EOS], "a b c"),
        ([2, 3, 4], "a b c"),
        ([2, 3, EOS, PAD, PAD], "a b"),
        ([PAD, 2, PAD, 3, EOS], "a b"),
        ([EOS], ""),
        ([], ""),
    ],
)
def test_only_stop_and_padding_tokens_are_left_out(thinking, ids, text):
    assert answer_texts(thinking, [ids], [EOS]) == [text]
    row = SampledCompletion({"prompt": "a"}, [2], ids, EOS not in ids)
    seen = []
    if EOS not in ids[:-1]:
        scores([row], [lambda completions, **_: seen.extend(completions) or [None]], thinking)
        assert seen == [text]


def test_another_stop_token_of_the_model(thinking):
    assert answer_texts(thinking, [[3, 4, 5]], [EOS, 5]) == ["b c"]


def test_a_stop_token_that_is_not_special_is_text(tokenizer):
    assert answer_texts(tokenizer, [[3, 4, 5, EOS]], [EOS, 5]) == ["b c d"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "'odd' returned None for 2 completions. Return a list with a number"),
        ("ab", "returned 'ab' for 2"),
        ([1.0], r"returned \[1.0\] for 2"),
        (1.0, "returned 1.0 for 2"),
        ({1.0, 2.0}, "returned a set"),
        (["good", "bad"], "returned 'good' of type str as a reward. Return a `float`"),
        ([1.0, "bad"], "returned 'bad' of type str"),
        ([[1.0], [0.0]], r"returned \[1.0\] of type list"),
        ([1.0, {"score": 1}], "returned {'score': 1} of type dict"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("later", [False, True], ids=["sync", "async"])
def test_what_cannot_be_a_reward_in_training_is_named(returned, message, later):
    def odd(prompts, **kwargs):
        return returned

    async def odd_later(prompts, **kwargs):
        return returned

    odd_later.__name__ = "odd"
    call = functools.partial(checked_reward(odd_later if later else odd), prompts=["a", "b"], completions=["c", "d"])
    with pytest.raises(ValueError, match=message):
        asyncio.run(call()) if later else call()


@pytest.mark.parametrize(
    "returned", [[1, None], [True, 0.5], (math.nan, None), [torch.tensor(1.0), np.float32(2)], np.array([1.0, 2.0])]
)
def test_what_is_a_reward_in_training_stays_as_it_is(returned):
    found = checked_reward(lambda **_: returned)(prompts=["a", "b"])
    assert all(ours is theirs or ours == theirs for ours, theirs in zip(found, returned, strict=True))


@pytest.mark.parametrize("function", [lengths_later, LengthsLater(), functools.partial(lengths_later, x=1)])
def test_checked_functions_that_are_async_stay_so(function):
    """TRL awaits them together."""
    from trl.trainer.utils import is_async_callable

    assert is_async_callable(checked_reward(function))
    assert not is_async_callable(checked_reward(lengths))


def test_a_reward_function_without_a_result_stops_training_with_its_name(
    tmp_path, tokenizer, prompts, student, teacher
):
    def forgotten(completions, **kwargs):
        [len(text) for text in completions]

    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        reward_funcs=[forgotten],
        args=config(tmp_path, max_steps=1, num_generations=2),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="The reward function 'forgotten' returned None for 4 completions"):
        trainer.train()


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_rewards_in_training_get_special_tokens(tmp_path, thinking, student, teacher, conversational):
    thinking.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    texts = ["a b", "c", "d e f", "g"] * 2
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0 for _ in completions]

    trainer = OPDTrainer(
        model=copy.deepcopy(student),
        teacher_model=copy.deepcopy(teacher),
        reward_funcs=[reward],
        args=config(tmp_path, max_steps=1, num_generations=2, top_k=0),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=thinking,
    )
    trainer.train()
    assert len(seen) == 4
    for completion, ids in seen:
        text = " ".join(WORDS[token] for token in ids if token not in (EOS, PAD))
        assert text
        assert completion == ([{"role": "assistant", "content": text}] if conversational else text)

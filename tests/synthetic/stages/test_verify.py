"""Verifiers: reward functions as TRL calls them, reward models, judges."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from chat_server import ChatServer
from helpers import SIZES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForSequenceClassification, set_seed

from trl_distill import TeacherUnavailable
from trl_distill.synthetic.address import Address
from trl_distill.synthetic.records import Answered, PromptScores, Refusal
from trl_distill.synthetic.sources.endpoint import Endpoint
from trl_distill.synthetic.stages.judge import JUDGE_PROMPT, EndpointJudging, Judge
from trl_distill.synthetic.stages.verify import RewardFunctions, RewardModel


REWARDS = """
import asyncio
import functools

def right(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]

def chatty(prompts, completions):
    return [len(c[0]["content"]) + len(p[0]["content"]) for c, p in zip(completions, prompts, strict=True)]

def sometimes(completions, **kwargs):
    return [None if c == "pass" else 0.5 for c in completions]

def broken(completions, **kwargs):
    raise KeyError("oops")

def short(completions, **kwargs):
    return [1.0]

def text(completions, **kwargs):
    return "123"

def none(completions, **kwargs):
    return None

def by_ids(completions, completion_ids):
    return [1.0 for _ in completions]

async def waits(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]

class Object:
    def __call__(self, completions, answer, **kwargs):
        return [c == a for c, a in zip(completions, answer, strict=True)]

class AsyncObject:
    async def __call__(self, completions, answer, log_extra, log_metric, trainer_state, **kwargs):
        log_metric("right", 1.0)
        return [c == a for c, a in zip(completions, answer, strict=True)]

right_object, right_async_object = Object(), AsyncObject()
right_partial = functools.partial(right, other=None)
"""
ROWS = [Answered("q", text, {"answer": "yes", "other": 1}) for text in ("yes", "no", "pass")]


@pytest.fixture
def functions(reward):
    reward(REWARDS)
    return lambda *names: RewardFunctions([f"my_verifier.{name}" for name in names])


def test_scores_and_their_mean(functions):
    assert functions("right").score(ROWS) == [1.0, 0.0, 0.0]
    assert functions("right", "sometimes").score(ROWS) == [0.75, 0.25, 0.0]
    assert isinstance(functions("sometimes").score(ROWS)[2], Refusal)


def test_messages_and_functions_without_keyword_arguments(functions):
    rows = [Answered([{"role": "user", "content": "qq"}], "yes", {"answer": "yes"})]
    assert functions("chatty").score(rows) == [5.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "KeyError.*completions are kept"),
        ("short", r"returned \[1.0\] for 3 completions"),
        ("text", "returned '123' for 3"),
        ("none", "returned None for 3"),
    ],
)
def test_broken_functions(functions, name, message):
    with pytest.raises(ValueError, match=message):
        functions(name).score(ROWS)


@pytest.mark.parametrize(
    "name", ["waits", "right_object", "right_async_object", "right_partial", "Object", "AsyncObject"]
)
def test_all_that_trl_takes_as_a_reward_function(functions, name):
    verifier = functions(name)
    verifier.needs(["answer"])
    assert verifier.score(ROWS) == [1.0, 0.0, 0.0]
    assert verifier.score(ROWS[:1]) == [1.0]  # again, in the same event loop
    assert "class AsyncObject" in verifier.identity()[0]


KINDS = {
    "list": [1, 0.5, None],
    "booleans": [True, False, None],
    "tuple": (1.0, 0.0, math.nan),
    "generator": lambda: (x for x in (1.0, 0.0, None)),
    "array": np.array([1.0, 0.5, np.nan], dtype=np.float32),
    "tensor": torch.tensor([1.0, 0.0, math.inf], dtype=torch.bfloat16, requires_grad=True),
    "list of tensors": [torch.tensor(1.0), torch.tensor([0.0]), torch.tensor(math.nan)],
    "exact": [Fraction(1), Decimal("0.5"), Decimal("NaN")],
    "not numbers": [1.0, 0.25, "1.0"],
    "others": [1, 0, [1.0]],
    "complex": [1.0, 0.0, 1j],
    "huge": [1, 0, 10**400],
    "infinite": [1.0, 0.0, -math.inf],
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_all_kinds_are_numbers_or_none(functions, kind):
    verifier, values = functions("right"), KINDS[kind]
    verifier.functions = {"f": lambda completions: values() if callable(values) else values}
    scores = verifier.score(ROWS)
    assert scores[0] == 1.0
    assert all(type(score) is float for score in scores[:2])
    assert scores[2].kind == "no reward function gives a score"


@given(st.lists(st.one_of(st.none(), st.floats(), st.booleans(), st.integers(), st.text(), st.just([])), min_size=1))
def test_no_score_is_nan_or_breaks_json(values):
    verifier = RewardFunctions(["trl.rewards.accuracy_reward"])
    verifier.functions = {"f": lambda completions: values, "g": lambda completions: [1.0] + [None] * (len(values) - 1)}
    scores = verifier.score([Answered("q", "a", {})] * len(values))
    assert all(isinstance(score, Refusal) or math.isfinite(score) for score in scores)
    json.dumps(PromptScores(0, scores).as_dict(), allow_nan=False)
    assert not isinstance(scores[0], Refusal)  # the other function's score counts alone


def test_token_ids_are_asked_for_in_vain(functions):
    with pytest.raises(ValueError, match="'completion_ids', but only the text"):
        functions("by_ids").needs([])


def test_missing_columns_are_found_before_anything_is_asked(functions):
    functions("right").needs(["answer"])
    with pytest.raises(ValueError, match=r"asks for 'answer'.*columns: gold"):
        functions("right").needs(["gold"])


def test_a_changed_function_has_another_identity(reward):
    reward(REWARDS)
    before = RewardFunctions(["my_verifier.right"]).identity()
    reward(REWARDS.replace("float(c == a)", "float(c != a)"), "my_verifier2")
    assert RewardFunctions(["my_verifier.right"]).identity() == before
    assert RewardFunctions(["my_verifier2.right"]).identity() != before


def make_reward_model(folder, labels=1):
    set_seed(0)
    config = Qwen3Config(**{**SIZES, "num_labels": labels})
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_reward_model_scores_rows_as_if_alone(tmp_path):
    name = make_reward_model(tmp_path)
    rows = [Answered("a b ", text, {}) for text in ("c", "d e f g h", "i j", "k l m")]
    batched, alone = RewardModel(name, batch_size=3).score(rows), RewardModel(name, batch_size=1).score(rows)
    assert batched == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in batched}) == 4
    model = RewardModel(name)
    ids = torch.tensor([model.tokenizer("a b c")["input_ids"]])
    assert batched[0] == pytest.approx(model.model(ids).logits.item(), abs=1e-5)


def test_a_reward_model_has_one_label(tmp_path):
    with pytest.raises(ValueError, match="has 2 labels"):
        RewardModel(make_reward_model(tmp_path, labels=2))
    with pytest.raises(ValueError, match="could not be loaded"):
        RewardModel("nowhere")


def judge(server, template="{prompt} {completion} {answer}"):
    return Judge(EndpointJudging(Endpoint(Address("endpoint", "m", server.url), backoff=0.001, retries=1)), template)


def test_a_closed_reward_model_holds_no_weights_and_scores_again(tmp_path):
    scorer = RewardModel(make_reward_model(tmp_path))
    rows = [Answered("a", "b", {})]
    before = scorer.score(rows)
    scorer.close()
    assert "model" not in vars(scorer)
    assert scorer.score(rows) == before


def test_a_judge_closes_its_connections_and_can_be_asked_again():
    with ChatServer(lambda text, seed: "Score: 1") as server:
        one = judge(server, "{prompt} {completion}")
        for _ in range(2):
            assert one.score([Answered("a", "b", {})] * 3) == [1.0] * 3
            client = one.judging.endpoint._client
            one.close()
            assert client._closed.is_set()


def test_a_judges_verdicts():
    said = {
        "yes": "It looks like Score: 0 at first.\n**Score:** 1",
        "no": "score = 0.25",
        "pass": "I cannot say.",
    }
    with ChatServer(lambda text, seed: said[text.split()[1]]) as server:
        scores = judge(server).score(ROWS)
        assert scores[:2] == [1.0, 0.25]
        assert scores[2] == Refusal("judge gave no score", "it wrote: 'I cannot say.'")
        assert server.asked[0]["temperature"] == 0.0
        server.refuse = lambda text: 400 if text.startswith("q no") else None
        assert judge(server).score(ROWS)[1].kind == "refused by the judge's endpoint"


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "content_filter", "tool_calls"])
def test_an_answer_of_a_judge_that_is_not_whole_is_no_verdict(reason):
    with ChatServer(lambda text, seed: "Score: 1") as server:
        server.finish_reason = reason
        assert judge(server).score(ROWS)[0].kind == "judge's answer is not whole"
        server.finish_reason = "end_turn"
        assert judge(server).score(ROWS) == [1.0, 1.0, 1.0]


def test_a_judges_odd_answers():
    """Asked for again, then listed; of parts the text counts, and the question's own words are not a verdict."""
    with ChatServer(lambda text, seed: "Score: 1") as server:
        odd = [{"choices": []}]
        server.alter = lambda text, answer: odd.pop() if odd else answer
        assert judge(server).score(ROWS[:1]) == [1.0]
        server.alter = lambda text, answer: {"error": {"message": "busy", "code": 529}} if " no " in text else answer
        scores = judge(server).score(ROWS)
        assert (scores[0], scores[2]) == (1.0, 1.0)
        assert scores[1].kind == "unusable answer of the judge's endpoint"
        parts = [{"type": "text", "text": "Sco"}, {"type": "text", "text": "re: .5"}]
        server.alter = lambda *_: {"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}
        assert judge(server).score(ROWS[:1]) == [0.5]
        server.alter = lambda *_: {"error": {"message": "busy"}}
        with pytest.raises(TeacherUnavailable, match="None of 9 answers of the judge's endpoint"):
            judge(server).score(ROWS * 3)
    with ChatServer(lambda text, seed: "They want me to\nend with one line:\nScore: 1") as server:
        assert judge(server, JUDGE_PROMPT).score(ROWS[:1])[0].kind == "judge gave no score"


def test_braces_in_what_is_judged_are_no_fields():
    with ChatServer(lambda text, seed: f"{text} Score: 1") as server:
        judge(server).score([Answered("{x}", "{prompt} \\frac{1}{2}", {"answer": "{"})])
        assert server.asked[0]["messages"][0]["content"] == "{x} {prompt} \\frac{1}{2} {"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{completion", "malformed"),
        ("{prompt}", "does not show the answer"),
        ("{completion} {gold}", "asks for 'gold'"),
    ],
)
def test_a_judges_prompt_is_looked_at_before_anything_is_asked(template, message):
    with pytest.raises(ValueError, match=message):
        Judge(EndpointJudging(Endpoint(Address("endpoint", "m", "http://h:1"))), template).needs(["answer"])

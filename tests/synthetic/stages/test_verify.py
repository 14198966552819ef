"""Verifiers: reward functions as TRL calls them, reward models, judges."""

from __future__ import annotations

import pytest
import torch
from chat_server import ChatServer
from helpers import SIZES, make_tokenizer
from transformers import Qwen3Config, Qwen3ForSequenceClassification, set_seed

from trl_distill.synthetic.address import Address
from trl_distill.synthetic.records import Answered, Refusal
from trl_distill.synthetic.sources.endpoint import Endpoint
from trl_distill.synthetic.stages.verify import Judge, RewardFunctions, RewardModel


REWARDS = """
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

def infinite(completions, **kwargs):
    return [float("nan") for _ in completions]
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
    [("broken", "KeyError.*completions are kept"), ("short", "1 numbers for 3 completions"), ("infinite", "nan")],
)
def test_broken_functions(functions, name, message):
    with pytest.raises(ValueError, match=message):
        functions(name).score(ROWS)


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
    return Judge(Endpoint(Address("endpoint", "m", server.url), backoff=0.001), template)


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
        Judge(Endpoint(Address("endpoint", "m", "http://h:1")), template).needs(["answer"])

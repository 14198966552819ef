"""Estimates against definitions and enumeration; answers of a model against its own logits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, VOCAB, make_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, set_seed

from trl_distill.data.sampling import Sampling, rollouts_of, scorer_of
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.objective.divergences import reverse_kl
from trl_distill.reporting.evaluation import Answer, answer_all, difference, distinct, estimate, pass_at_k, summarise


SMALL = {
    GPT2Config: {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    OPTConfig: {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 5, 4), (6, 1, 6)])
def test_pass_at_k_by_enumeration(samples, correct, k):
    right = [i < correct for i in range(samples)]
    chosen = list(itertools.combinations(right, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_as_many_answers(k):
    with pytest.raises(ValueError, match="cannot be estimated from 4 answers"):
        pass_at_k(4, 1, k)


def test_distinct_n_grams():
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == 4 / 6
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert math.isnan(distinct([[1], [2]], 2))


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_a_ratio_weighs_prompts_by_their_counts():
    assert estimate([1.0, 9.0], [1.0, 3.0]).value == 2.5
    assert estimate([1.0, math.nan], [2.0, 4.0]).value == 0.5
    assert math.isnan(estimate([]).value)


def made(scores: list[list[float | None]], kl: float | None = None) -> list[Answer]:
    return [
        Answer(prompt, (10 + prompt, 20 + i, EOS), score, i == 0, kl)
        for prompt, row in enumerate(scores)
        for i, score in enumerate(row)
    ]


def test_a_summary_by_hand():
    found = summarise(made([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], kl=0.6), correct_from=0.5)
    assert found["avg@2"].value == pytest.approx(0.5)
    assert found["pass@1"].value == pytest.approx(0.5)
    assert found["pass@2"].value == pytest.approx(2 / 3)
    assert found["pass@2 − avg@2"].value == pytest.approx(1 / 6)
    assert found["kl"].value == pytest.approx(0.2)
    assert (found["length"].value, found["truncated"].value) == (3.0, 0.5)
    assert found["distinct-1"].value == pytest.approx(4 / 6)
    assert "distinct-4" in found


def test_without_verifier_or_teacher_the_rest_is_told():
    found = summarise(made([[None, None]]))
    assert not [name for name in found if name.startswith(("avg", "pass", "kl"))]
    assert found["length"].value == 3.0


def test_answers_without_a_score_are_left_out():
    found = summarise(made([[1.0, None], [None, None], [0.0, 0.0]]), ks=[1, 2])
    assert found["avg@2"].value == 0.5
    assert found["pass@2"].value == 0.0  # only the last prompt has two scores


def test_a_difference_is_paired():
    better, worse = made([[1.0], [1.0], [0.5]]), made([[0.8], [0.8], [0.3]])
    found = difference(better, worse)
    assert found == pytest.approx((0.2, 0.2, 0.2))


def starts_with_three(completion_ids, **_):
    return [float(ids[0] == 3) for ids in completion_ids]


@pytest.fixture
def pair():
    student, teacher = make_model("tied", seed=1).eval(), make_model("untied", seed=2).eval()
    for model in (student, teacher):
        add_teacher_forward(model)
    return student, teacher


def test_answers_and_their_kl(pair, tokenizer):
    student, teacher = pair
    rows = [{"prompt": text} for text in ("a", "b c", "d")]
    how = Sampling(limit=5, stops=(EOS,), generations=3)
    found = list(
        itertools.chain(*answer_all(student, rows, tokenizer, how, [starts_with_three], teacher, batch_size=6))
    )
    assert [answer.prompt for answer in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for answer in found:
        assert len(answer.ids) <= 5
        assert answer.truncated == (EOS not in answer.ids)
        assert answer.score == float(answer.ids[0] == 3)
        prompt = tokenizer(rows[answer.prompt]["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *answer.ids]])
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[:, len(prompt) - 1 : -1] for model in (student, teacher)]
        assert answer.kl == pytest.approx(reverse_kl(*logits).sum().item(), rel=1e-4)


def test_answers_that_begin_with_given_tokens(pair, tokenizer):
    student, _ = pair
    rows, how = [{"prompt": "a"}, {"prompt": "b"}], Sampling(limit=4, stops=(EOS,), generations=2)
    found = list(itertools.chain(*answer_all(student, rows, tokenizer, how, prefixes=[[5, 6], [7]])))
    assert [answer.ids[:1] for answer in found] == [(5,), (5,), (7,), (7,)]
    assert all(answer.ids[:2] == (5, 6) for answer in found[:2])
    assert all(answer.kl is None and answer.score is None for answer in found)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "PEFT"])
def test_a_checkpoint_s_own_settings_do_not_bend_what_is_sampled(pair, tokenizer, adapter):
    student = pair[0]
    model = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"])).eval() if adapter else student
    rows, how = [{"prompt": "a b c"}], Sampling(limit=8, stops=(EOS,), generations=16)
    plain = list(itertools.chain(*answer_all(model, rows, tokenizer, how)))
    student.generation_config.suppress_tokens = sorted({id for answer in plain for id in answer.ids if id != EOS})
    own = student.generation_config
    assert list(itertools.chain(*answer_all(model, rows, tokenizer, how))) == plain
    assert student.generation_config is own


@pytest.mark.parametrize("family", [GPT2Config, OPTConfig])
def test_absolute_positions_do_not_depend_on_the_batch(family):
    """Rows of unequal length are padded on the left; alone there is no padding."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(family(vocab_size=VOCAB, **SMALL[family])).eval()
    add_teacher_forward(model)
    rows = [[2, 3, 4, 5, 6, 7], [8, 9]]
    answers = [[10, 11, 12], [13, 14, 15]]
    together = scorer_of(model)(rollouts_of(rows, answers, PAD, "cpu")).hidden
    alone = [
        scorer_of(model)(rollouts_of([row], [answer], PAD, "cpu")).hidden
        for row, answer in zip(rows, answers, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))

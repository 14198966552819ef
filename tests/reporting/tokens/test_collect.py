"""What is measured, against enumeration with whole logits; and that nothing is left changed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, make_model

from trl_distill.data.sampling import (
    SampledCompletion,
    Sampling,
    dataset_completion,
    preserving_state,
    sample_completions,
    scorer_of,
)
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.objective.divergences import as_one_class, reverse_kl, summands
from trl_distill.reporting.tokens import collect
from trl_distill.reporting.tokens.collect import scored, with_rewards


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
COMPLETIONS = [[3, 4, EOS], [6, 7, 8, 9], [10, EOS]]


@pytest.fixture
def pair(student, teacher):
    for model in (student, teacher):
        model.eval()
        add_teacher_forward(model)
    return student, teacher


def written(**columns) -> list[SampledCompletion]:
    rows = [{"prompt": "a", **{name: values[i] for name, values in columns.items()}} for i in range(len(PROMPTS))]
    return [SampledCompletion(row, p, c, c[-1] != EOS) for row, p, c in zip(rows, PROMPTS, COMPLETIONS, strict=True)]


def enumerated(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1]  # (C, V)


@pytest.mark.parametrize("tile", [2**24, 29, 1])
@pytest.mark.parametrize("merged", [(), (EOS, 4)])
@torch.no_grad()
def test_numbers_are_those_of_whole_logits_row_by_row(pair, tokenizer, monkeypatch, tile, merged):
    monkeypatch.setattr(collect, "LOGITS_TILE", tile)
    student, teacher = pair
    found = scored(written(), [scorer_of(student)], scorer_of(teacher), tokenizer, "cpu", merged, 0.7)
    for completion, prompt, ids in zip(found, PROMPTS, COMPLETIONS, strict=True):
        q, p = (enumerated(model, prompt, ids) / 0.7 for model in pair)
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        kl, forward = reverse_kl(q, p), summands("forward_kl", log_q, log_p).sum(-1)
        if merged:
            some = list(merged)
            kl = as_one_class(kl, log_q[:, some], log_p[:, some])
            forward = as_one_class(forward, log_q[:, some], log_p[:, some], "forward_kl")
        view = completion.views[0]
        chosen = torch.tensor(ids)[:, None]
        for ours, expected in (
            (view.kl, kl),
            (view.forward_kl, forward),
            (view.log_probs, log_q.gather(1, chosen)[:, 0]),
            (completion.teacher.log_probs, log_p.gather(1, chosen)[:, 0]),
        ):
            torch.testing.assert_close(torch.tensor(ours), expected, rtol=1e-4, atol=1e-5)
        for top, log in ((view.top, log_q), (completion.teacher.top, log_p)):
            values, best = log.exp().topk(5)
            assert [[token for token, _ in row] for row in top] == best.tolist()
            torch.testing.assert_close(torch.tensor([[v for _, v in row] for row in top]), values, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_vocabularies_of_different_size_are_compared_over_what_both_have(student, tokenizer):
    teacher = make_model(seed=2, vocab_size=40)
    for model in (student, teacher):
        add_teacher_forward(model.eval())
    found = scored(written(), [scorer_of(student)], scorer_of(teacher), tokenizer, "cpu")
    expected = reverse_kl(*(enumerated(model, PROMPTS[0], COMPLETIONS[0]) for model in (student, teacher)))
    torch.testing.assert_close(torch.tensor(found[0].views[0].kl), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_teacher_reads_its_own_prompt(pair, tokenizer):
    student, teacher = pair
    rows = written(teacher_prompt=["b c", None, "d"])
    found = scored(rows, [scorer_of(student)], scorer_of(teacher), tokenizer, "cpu")
    for index, prompt in ((0, tokenizer("b c")["input_ids"]), (1, PROMPTS[1]), (2, tokenizer("d")["input_ids"])):
        q = enumerated(student, PROMPTS[index], COMPLETIONS[index])
        p = enumerated(teacher, prompt, COMPLETIONS[index])
        torch.testing.assert_close(torch.tensor(found[index].views[0].kl), reverse_kl(q, p), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_students_on_the_same_completions(pair, tokenizer):
    student, teacher = pair
    found = scored(written(), [scorer_of(student), scorer_of(teacher)], scorer_of(teacher), tokenizer, "cpu")
    assert all(max(completion.views[1].kl) < 1e-6 < min(completion.views[0].kl) for completion in found)


def test_sampling_ends_at_stops_and_repeats_with_its_seed(student):
    how = Sampling(limit=12, stops=(EOS, 5, 6, 7), generations=3, seed=4)
    rows = [{"prompt": str(i)} for i in range(3)]
    first, again = (sample_completions(student, rows, PROMPTS, PAD, how) for _ in range(2))
    assert first == again
    assert [row.row["prompt"] for row in first] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert len({tuple(row.completion) for row in first}) > 3
    for row in first:
        assert not set(row.completion[:-1]) & set(how.stops)
        assert row.truncated == (row.completion[-1] not in how.stops)
        assert len(row.completion) == 12 or not row.truncated


def test_sampling_ignores_the_checkpoints_own_generation_settings(student):
    how, rows = Sampling(limit=12, stops=(EOS,), seed=4), [{}] * 3
    plain = sample_completions(student, rows, PROMPTS, PAD, how)
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 3.0, "min_p": 0.9}
    for name, value in {**settings, "do_sample": True}.items():
        setattr(student.generation_config, name, value)
    assert sample_completions(student, rows, PROMPTS, PAD, how) == plain


def test_nothing_is_left_changed(student):
    student.train()
    student.model.layers[0].eval()  # on purpose: not all modules need be in one mode

    def state():
        modes = [module.training for module in student.modules()]
        return modes, random.random(), np.random.rand(), torch.rand(3).tolist()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    untouched = state()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)

    def fails():
        with preserving_state(student):
            sample_completions(student, [{}] * 3, PROMPTS, PAD, Sampling(limit=4, stops=(EOS,)))
            assert not any(module.training for module in student.modules())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert state() == untouched


def test_completions_of_the_dataset(tokenizer):
    how = Sampling(limit=3, stops=(EOS,))
    found = dataset_completion({"prompt": "a b", "completion": "c d"}, tokenizer, how)
    assert (found.completion, found.truncated) == ([*tokenizer("c d")["input_ids"], EOS], False)
    assert dataset_completion({"prompt": "a", "completion": "c d e f"}, tokenizer, how).truncated
    with pytest.raises(ValueError, match="--completions sample"):
        dataset_completion({"prompt": "a", "completion": ""}, tokenizer, how)


@torch.no_grad()
def test_rewards_are_asked_as_trl_asks(pair, tokenizer):
    student, teacher = pair
    rows = written(answer=["b", "e", "i"])
    found = scored(rows, [scorer_of(student)], scorer_of(teacher), tokenizer, "cpu")

    def right(prompts, completions, completion_ids, answer, **_):
        assert (len(prompts), completion_ids) == (3, COMPLETIONS)
        return [float(text.startswith(gold)) for text, gold in zip(completions, answer, strict=True)]

    def sometimes(completions, **_):
        return [None, 2, None]

    rewarded = with_rewards(found, rows, [right, sometimes], tokenizer)
    assert [row.rewards for row in rewarded] == [
        {"right": 1.0, "sometimes": None},
        {"right": 1.0, "sometimes": 2.0},
        {"right": 1.0, "sometimes": None},
    ]
    assert [row.reward for row in rewarded] == [1.0, 3.0, 1.0]
    with pytest.raises(ValueError, match=r"returned \[1.0\] for 3 completions"):
        with_rewards(found, rows, [lambda **_: [1.0]], tokenizer)

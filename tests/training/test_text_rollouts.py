"""A teacher with another tokenizer on stale rollouts, in bf16, and with several stop tokens on both sides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers import config, gradients, in_training, make_model, relative_error
from text_models import MERGES, STUDENT, TEACHER_STOPS, make_bpe, make_pair

from trl_distill import OPDTrainer
from trl_distill.alignment.completions import align


PROMPT = "ab"
TOKENS = [*STUDENT, "<stop>"]
STOPS = (1, TOKENS.index("<stop>"))


def build(folder, made, **changes) -> OPDTrainer:
    student, own, teacher, _ = made
    settings = {"loss_type": "dr_grpo", "top_k": 0, "max_completion_length": 2, "num_generations": 2, **changes}
    return in_training(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(folder, cross_tokenizer=True, **settings),
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 64}),
            processing_class=own,
        )
    )


def batch_of(made, rows: list[list[int]], **extra) -> dict:
    """Rows of one length."""
    prompts, theirs = (torch.tensor([tokenizer(PROMPT).input_ids] * len(rows)) for tokenizer in (made[1], made[3]))
    ids = torch.tensor(rows)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "text_prompt_0_ids": theirs,
        "text_prompt_0_mask": torch.ones_like(theirs),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.zeros(len(rows)),
        "num_items_in_batch": torch.tensor(ids.numel()),
        **extra,
    }


def log_q(model, own, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of a completion's next tokens, `(n, V)`."""
    prompt = own(PROMPT).input_ids
    return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def test_stale_tokens_are_weighted_by_their_ratio(tmp_path):
    """With completions of one token the ratio is that of the completion, and the expected gradient the fresh one."""
    made = make_pair(tmp_path / "teacher")
    trainer = build(tmp_path, made)
    writer = make_model("untied", seed=7, vocab_size=len(STUDENT), hidden_size=8, head_dim=4)
    found = []
    for wrote, stale in ((made[0], False), (writer, True)):
        trainer.model.zero_grad()
        with torch.no_grad():
            written = log_q(wrote, made[1], [0])[0]
        for token, weight in enumerate(written.exp().tolist()):
            old = {"old_per_token_logps": written[token].float().view(1, 1)} if stale else {}
            (trainer.rollout_loss(trainer.model, batch_of(made, [[token]], **old)) * weight).backward()
        found.append(gradients(trainer.model))
    assert relative_error(found[1], found[0]) < 1e-4
    assert found[0].norm() > 1e-3


def test_it_trains_on_rollouts_that_are_used_twice(tmp_path):
    trainer = build(tmp_path, make_pair(tmp_path / "teacher"), num_iterations=2, max_steps=4, kl_discount=1.0)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


def test_bf16_rounds_products_only(tmp_path):
    rows = [[4, 3], [2, 2], [0, 4], [3, 4]]
    found = []
    for bf16 in (False, True):
        made = make_pair(tmp_path / "teacher")
        trainer = build(tmp_path, made, bf16=bf16)
        loss = trainer.rollout_loss(trainer.model, batch_of(made, rows))
        loss.backward()
        found.append(gradients(trainer.model))
    assert 0 < relative_error(found[1], found[0]) < 0.05


@pytest.fixture
def several_stops(tmp_path):
    """A pair in which the student, too, has two stop tokens."""
    student, _, teacher, other = make_pair(tmp_path / "teacher")
    own = make_bpe(TOKENS, MERGES["student"], "<eos>")
    student = make_model("untied", seed=1, vocab_size=len(TOKENS), hidden_size=8, head_dim=4, initializer_range=0.3)
    student.get_input_embeddings().padding_idx = None
    student.generation_config.eos_token_id = list(STOPS)
    return student, own, teacher, other


def objective(made, pair) -> torch.Tensor:
    """E[log q − log p] over texts of at most one token and what follows, with stop tokens of each as one."""
    student, own, teacher, other = made
    theirs = other(PROMPT).input_ids

    def log_p(ids: list[int], stopped: bool) -> float:
        with torch.no_grad():
            rows = teacher(input_ids=torch.tensor([[*theirs, *ids]])).logits[0].double().log_softmax(-1)
        before = sum(rows[len(theirs) - 1 + i, token].item() for i, token in enumerate(ids))
        return before + (rows[-1, TEACHER_STOPS].logsumexp(0).item() if stopped else 0.0)

    total = torch.zeros((), dtype=torch.float64)
    first = log_q(student, own, [0])[0]
    stop = first[list(STOPS)].logsumexp(0)
    total = total + stop.exp() * (stop - log_p([], True))
    for token in (i for i in range(len(TOKENS)) if i not in STOPS):
        following = log_q(student, own, [token, 0])[1]
        stop = following[list(STOPS)].logsumexp(0)
        text = align(pair, [token], True).paths[0]
        total = total + (first[token] + stop).exp() * (first[token] + stop - log_p(text, True))
        for second in (i for i in range(len(TOKENS)) if i not in STOPS):
            ids = [token, second]
            aligned = align(pair, ids, False)
            log_both = first[token] + following[second]
            known = [first[token], following[second]][: aligned.end]
            cost = sum(known, torch.zeros((), dtype=torch.float64)) - (log_p(aligned.paths[0], False) if known else 0.0)
            total = total + log_both.exp() * (cost + 10.0 * sum(aligned.charged))
    return total


def test_several_stop_tokens_of_both_are_one_class(tmp_path, several_stops):
    """At γ = 1, by enumeration: the expected gradient of the loss is that of the objective."""
    student, own, *_ = several_stops
    trainer = build(tmp_path, several_stops, kl_discount=1.0)
    assert trainer.teacher.shared.student_stops == STOPS
    assert list(trainer.teacher.shared.teacher_stops) == TEACHER_STOPS
    inner = [i for i in range(len(TOKENS)) if i not in STOPS]
    rows = [[stop] for stop in STOPS] + [list(ids) for ids in itertools.product(inner, range(len(TOKENS)))]
    trainer.model.zero_grad()
    mass = 0.0
    for row in rows:
        with torch.no_grad():
            weight = log_q(student, own, row).gather(1, torch.tensor(row)[:, None]).sum().exp()
        mass += weight.item()
        (trainer.rollout_loss(trainer.model, batch_of(several_stops, [row])) * 2 * weight.float()).backward()
    assert mass == pytest.approx(1, abs=1e-5)
    found = gradients(student)
    student.zero_grad()
    objective(several_stops, trainer.teacher.pair).backward()
    assert relative_error(found, gradients(student)) < 1e-4

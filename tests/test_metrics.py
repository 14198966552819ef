"""What is logged, against naive computation from full logits."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from helpers import VOCAB, batch, config, in_training, make_model

from trl_distill import OPDTrainer, heads
from trl_distill.fused import Form, fused_divergence
from trl_distill.heads import COMPARED, LMHead, compared
from trl_distill.metrics import by_reward, means
from trl_distill.signals import HiddenStates


def test_means_are_over_what_the_mask_marks():
    values, mask = torch.tensor([[1.0, 2.0], [torch.nan, 4.0]]), torch.tensor([[True, True], [False, True]])
    found = means(Accelerator(cpu=True), {"all": (values, mask), "none": (values, torch.zeros_like(mask))})
    assert found == {"all": (1.0 + 2.0 + 4.0) / 3}


def naive_logits(trainer, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both models at the judged tokens, `(N, V)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    places, mask = slice(inputs["prompt_ids"].shape[1] - 1, -1), inputs["completion_mask"].bool()
    with torch.no_grad():
        models = (trainer.model, trainer.teacher.model)
        found = [m(input_ids=ids, attention_mask=attended).logits[:, places][mask].log_softmax(-1) for m in models]
    return found[0], found[1]


def length(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
@pytest.mark.parametrize("rewards", [None, [length]], ids=["pure", "rewards"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_values_against_full_logits(tmp_path, tokenizer, prompts, monkeypatch, rewards, estimator, divergence):
    """With every token looked at; the same keys whatever the mode."""
    if divergence == "jsd" and estimator != "full":
        pytest.skip("there is no such estimator")
    monkeypatch.setattr(heads, "LOOK_EVERY", 1)
    trainer = OPDTrainer(
        model=make_model("untied", seed=1),
        teacher_model=make_model("bias", seed=2),
        reward_funcs=rewards,
        args=config(
            tmp_path, num_generations=2 if rewards else 1, kl_estimator=estimator, kl_top_k=VOCAB, divergence=divergence
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    in_training(trainer)
    advantages = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    inputs = {**batch(rows=4, completion=9), "rewards": torch.arange(4.0), "advantages": advantages}
    trainer.rollout_loss(trainer.model, inputs)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    log_q, log_p = naive_logits(trainer, inputs)
    mask = inputs["completion_mask"].bool()
    ids = inputs["completion_ids"][mask]
    likeliest = [x.topk(heads.TOP).indices for x in (log_q, log_p)]
    common = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(*likeliest, strict=True)])
    expected = {
        "distill/reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "distill/forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "distill/teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "distill/top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).float(),
        "distill/top_overlap": common,
    }
    if estimator == "sampled":
        k1 = (log_q - log_p)[torch.arange(len(ids)), ids]
        expected["distill/reverse_kl"] = k1
    if estimator != "full" or rewards:
        expected["distill/teacher_log_prob"] = log_p[torch.arange(len(ids)), ids]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-6), name
    if divergence == "jsd":
        return
    kl = torch.zeros(mask.shape).masked_scatter(mask, expected["distill/reverse_kl"])
    for i in range(4):
        parts = [
            row[:len_][(4 * torch.arange(len_)) // len_ == i]
            for row, len_ in zip(kl, mask.sum(1).tolist(), strict=True)
        ]
        values = torch.cat(parts)
        if len(values):
            assert found[f"distill/reverse_kl/quarter{i + 1}"] == pytest.approx(values.mean().item(), rel=1e-4)
    ordered = kl[mask].clamp(min=0).sort(descending=True).values
    needed = next(n for n in range(1, len(ordered) + 1) if ordered[:n].sum() >= 0.8 * ordered.sum() - 1e-7)
    assert found["distill/concentration"] == pytest.approx(needed / len(ordered))
    if rewards:
        for name, rows in (("rewarded", slice(2, 4)), ("punished", slice(0, 2))):
            assert found[f"distill/reverse_kl/{name}"] == pytest.approx(kl[rows][mask[rows]].mean().item(), rel=1e-4)


def test_few_tokens_are_looked_at(monkeypatch):
    head, signal = LMHead(make_model(seed=1)), HiddenStates(torch.randn(1000, 16), LMHead(make_model(seed=2)))
    for length, every, seen in ((1000, 61, 17), (1000, 60, 17), (1000, 1, 112), (3, 61, 1), (0, 61, 0)):
        monkeypatch.setattr(heads, "LOOK_EVERY", every)
        part = HiddenStates(signal.hidden[:length], signal.head)
        found = compared(torch.randn(length, 16), head, part, 1.0)
        assert found.shape == (len(COMPARED), seen)
        form, ids = Form(), torch.zeros(length).long()
        found = fused_divergence(
            torch.randn(length, 16), head, part.hidden, part.head, form, ids, look_every=heads.look_every(length)
        )
        assert found.looked.shape == (len(COMPARED), seen)


def test_the_reward_s_sign():
    per_token, mask = torch.ones(3, 2), torch.tensor([[True, True], [True, False], [True, True]])
    found = by_reward(per_token, mask, torch.tensor([1.0, -1.0, 0.0]))
    assert found["rewarded"][1].tolist() == [[True, True], [False, False], [False, False]]
    assert found["punished"][1].tolist() == [[False, False], [True, False], [False, False]]

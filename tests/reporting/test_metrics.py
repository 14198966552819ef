"""What is logged, against naive computation from full logits."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from helpers import VOCAB, batch, config, in_training, make_model

from trl_distill import OPDTrainer
from trl_distill.heads import comparison
from trl_distill.heads.comparison import COMPARED, comparison_from_states
from trl_distill.heads.fused import DivergenceSpec, fused_divergence
from trl_distill.heads.lm_head import FixedHead, LMHead
from trl_distill.reporting.metrics import by_reward, means
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
def test_values_against_full_logits(tmp_path, tokenizer, prompts, rewards, estimator, divergence):
    """With every token looked at; the same keys whatever the mode."""
    if divergence == "jsd" and estimator != "full":
        pytest.skip("there is no such estimator")
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
    likeliest = [x.topk(comparison.TOP).indices for x in (log_q, log_p)]
    common = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(*likeliest, strict=True)])
    expected = {
        "distill/reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "distill/forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "distill/teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "distill/top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).float(),
        "distill/top_overlap": common,
        "distill/compared_tokens": torch.tensor([float(len(ids))]),
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


@pytest.mark.parametrize(
    ("length", "least", "most"),
    [
        *[(0, 0, 0), (1, 1, 1), (16, 16, 16), (47, 47, 47), (48, 16, 16), (64, 21, 22), (127, 18, 19), (160, 17, 18)],
        *[(500, 55, 56), (640, 71, 72), (1000, 66, 77), (3904, 64, 67), (7808, 128, 128), (100_000, 127, 128)],
    ],
)
def test_tokens_that_are_compared(length, least, most):
    """Not one or two: an agreement of 0 at one token looks like broken ids."""
    model = make_model(seed=1)
    head, signal = LMHead(model), HiddenStates(torch.randn(length, 16), LMHead(make_model(seed=2)))
    hidden = torch.randn(length, 16)
    for seed in range(5):
        ids = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
        positions = comparison.compared_positions(ids)
        assert least <= len(range(length)[positions]) <= most
    if length > 1000:
        return
    found = comparison_from_states(hidden, head, signal, 1.0, ids)
    fused = fused_divergence(hidden, head, signal.hidden, signal.head, DivergenceSpec(), ids, positions=positions)
    torch.testing.assert_close(found, fused.comparison)
    assert found.shape[1] == len(range(length)[positions])


@pytest.mark.parametrize("amp", [False, True], ids=["16 bits", "autocast"])
def test_compared_logits_are_not_rounded(amp):
    """Two models that nearly agree: the KL of logits rounded to bf16 is that of the rounding."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = 2 * torch.randn(50, 16, generator=draw), torch.randn(VOCAB, 16, generator=draw)
    other = weight + 0.01 * torch.randn(VOCAB, 16, generator=draw)
    exact = [x.bfloat16().double() for x in (hidden, weight, other)]
    log_q, log_p = ((exact[0] @ x.T).log_softmax(-1) for x in exact[1:])
    dtype, model = torch.float32 if amp else torch.bfloat16, make_model("untied", seed=1)
    heads = [FixedHead(model, x.to(dtype), None) for x in (weight, other)]
    states, ids = hidden.to(dtype), torch.zeros(50).long()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found = comparison_from_states(states, heads[0], HiddenStates(states, heads[1]), 1.0, ids)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)[comparison.compared_positions(ids)]
    assert kl.mean() < 1e-2
    torch.testing.assert_close(found[0].double(), kl, rtol=1e-2, atol=1e-6)


def test_no_place_is_preferred():
    """With a fixed start, first tokens would be among them always, and these are unlike the others."""
    seen = torch.zeros(640)
    for seed in range(900):
        ids = torch.randint(150_000, (640,), generator=torch.Generator().manual_seed(seed))
        seen[comparison.compared_positions(ids)] += 1
    assert seen.min() > 60  # of 100 that are expected
    assert seen.max() < 140


def test_stop_tokens_count_as_one():
    """Student and teacher are sure that the answer ends here, and end it with different ids."""
    log_q, log_p = (torch.full((1, VOCAB), -20.0).index_fill_(1, torch.tensor([stop]), 20.0) for stop in (3, 7))
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    apart = dict(zip(COMPARED, comparison.comparison(log_q, log_p)[:, 0].tolist(), strict=True))
    merged = dict(zip(COMPARED, comparison.comparison(log_q, log_p, [3, 7])[:, 0].tolist(), strict=True))
    assert apart["reverse_kl"] > 39
    assert apart["top1_agreement"] == 0
    assert merged["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert merged["forward_kl"] == pytest.approx(0, abs=1e-5)
    assert merged["top1_agreement"] == 1


def test_rows_without_a_judged_token_have_no_objective(tmp_path, tokenizer, prompts):
    trainer = OPDTrainer(
        model=make_model(seed=1),
        teacher_model=make_model(seed=2),
        reward_funcs=[length],
        args=config(tmp_path, num_generations=2),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    in_training(trainer)
    inputs = {**batch(rows=4, completion=9), "rewards": torch.arange(4.0), "advantages": torch.zeros(4)}
    for rows in (inputs, {name: values[1:] if values.dim() else values for name, values in inputs.items()}):
        if rows is inputs:
            rows["completion_mask"][0] = 0
        trainer.rollout_loss(trainer.model, rows)
    for name in ("distill/sequence_kl", "objective"):
        cut, without = trainer._metrics["train"][name]
        assert cut == pytest.approx(without, rel=1e-5), name


def test_the_reward_s_sign():
    per_token, mask = torch.ones(3, 2), torch.tensor([[True, True], [True, False], [True, True]])
    found = by_reward(per_token, mask, torch.tensor([1.0, -1.0, 0.0]))
    assert found["rewarded"][1].tolist() == [[True, True], [False, False], [False, False]]
    assert found["punished"][1].tolist() == [[False, False], [True, False], [False, False]]

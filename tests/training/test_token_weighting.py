"""Token weights in the loss: gradients against naive autograd and enumeration, micro-batches, resumed runs, logs."""

from __future__ import annotations

import copy

import pytest
import torch
from enumeration import COMPLETIONS, LENGTH, distributions, expected_gradient, kl, log_prob, tiny_model
from helpers import VOCAB, batch, config, gradients, in_training, make_tokenizer, relative_error

from trl_distill import OPDTrainer
from trl_distill.estimators import make_estimator
from trl_distill.objective.weighting import PreviousStep, tally
from trl_distill.training.loss_weighting import LossWeighting, RunningStatistics


SPREAD = torch.linspace(0.25, 2, 8)  # of the quantities in the step before, as multiples of these numbers:
IN_BATCH = {"divergence": 1.3, "student_entropy": 2.75}
ENUMERATED = {"divergence": 0.4, "student_entropy": 1.5}


def twice_where_they_agree(agreement):
    return 1 + agreement


WEIGHTINGS = {
    "cap, fixed": {"token_weighting": "cap", "token_weighting_kwargs": {"nats": 0.4}},
    "cap, of the mean": {"token_weighting": "cap", "token_weighting_kwargs": {"times_mean": 0.5}},
    "top_share": {"token_weighting": "top_share", "token_weighting_kwargs": {"share": 0.6}},
    "student_entropy": {"token_weighting": "student_entropy", "token_weighting_kwargs": {"share": 0.6}},
    "teacher_entropy": {"token_weighting": "teacher_entropy"},
    "position": {"token_weighting": "position", "token_weighting_kwargs": {"tokens": 2}},
    "agreement": {"token_weighting": twice_where_they_agree},
}


def statistics(before: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: tally(centre * SPREAD).double() for name, centre in before.items()}


def naive_weights(
    name: str, divergence: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor, before: dict[str, float] = IN_BATCH
) -> torch.Tensor:
    """By the formulas, from full log-probabilities `(..., T, V)`."""
    last = PreviousStep(statistics(before))
    entropy, of_teacher = (-(x.exp() * x).sum(-1) for x in (log_q, log_p))
    return {
        "cap, fixed": lambda: (0.4 / divergence).clamp(max=1),
        "cap, of the mean": lambda: (0.5 * 1.125 * before["divergence"] / divergence).clamp(max=1),
        "top_share": lambda: (divergence >= last.threshold("divergence", 0.6)).double(),
        "student_entropy": lambda: (entropy >= last.threshold("student_entropy", 0.6)).double(),
        "teacher_entropy": lambda: (-of_teacher).exp(),
        "position": lambda: (torch.arange(divergence.shape[-1]) < 2).double().expand_as(divergence),
        "agreement": lambda: 1 + (log_q.argmax(-1) == log_p.argmax(-1)).double(),
    }[name]().detach()


def after_a_step(trainer, before: dict[str, float] = IN_BATCH):
    """As if a step had measured this."""
    for kept in trainer.loss.weighting.kept.values():
        kept.add({name: statistics(before)[name] for name in trainer.loss.weighting.weighting.counted})
    return in_training(trainer)


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    def build(reward_funcs=None, folder="out", train_dataset=prompts, **changes):
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=reward_funcs,
            args=config(tmp_path / folder, **changes),
            train_dataset=train_dataset,
            processing_class=tokenizer,
        )

    return build


def letters(completions, **_) -> list[float]:
    return [text.count("a") + 0.1 * len(text) for text in completions]


def log_probs(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    places = slice(inputs["prompt_ids"].shape[1] - 1, -1)
    return model(input_ids=ids, attention_mask=mask).logits[:, places].log_softmax(-1)


@pytest.mark.parametrize("way", ["distillation", "with rewards", "off-policy"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gradients_against_naive_autograd_on_full_logits(make, name, way):
    """Loss and gradient for a ragged micro-batch. Off-policy it is the forward KL on the same rows."""
    rewards = {"reward_funcs": letters, "num_generations": 2} if way == "with rewards" else {}
    trainer = after_a_step(make(beta=0.7, loss_type="dr_grpo", **WEIGHTINGS[name], **rewards))
    inputs = batch(rows=4)
    if rewards:
        inputs |= {"advantages": torch.tensor([0.7, -0.4, 1.1, 0.2])}
    if way == "off-policy":
        inputs |= {"row_weight": torch.ones(4)}
    loss = trainer.rollout_loss(trainer.model, inputs)
    loss.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()

    log_q, log_p = log_probs(trainer.model, inputs), log_probs(trainer.teacher.model, inputs).detach()
    divergence = kl(log_p, log_q) if way == "off-policy" else kl(log_q, log_p)
    weights = naive_weights(name, divergence.detach(), log_q.detach(), log_p)
    mask = inputs["completion_mask"]
    assert name == "agreement" or weights[mask.bool()].unique().numel() > 1
    per_token = 0.7 * weights * divergence
    if rewards:
        sampled = log_q.gather(2, inputs["completion_ids"][..., None])[..., 0]
        per_token = per_token - inputs["advantages"][:, None] * (sampled - sampled.detach() + 1)
    expected = (per_token * mask).sum() / (len(mask) * trainer.max_completion_length)
    expected.backward()
    assert relative_error(found, gradients(trainer.model)) < 1e-4
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=1e-6)


# -- expected gradients, by enumeration --------------------------------------------------------------------------------


def weighted_oracle(student, teacher, name: str, discount: float) -> torch.Tensor:
    """w_t ∇KL_t at each prefix, plus ∇log q(y_t) times the discounted w KL still to come, averaged over completions."""
    student.zero_grad()
    for y in COMPLETIONS:
        log_q = distributions(student, y)
        with torch.no_grad():
            log_p = distributions(teacher, y)
        value = kl(log_q, log_p)
        cost = naive_weights(name, value.detach(), log_q.detach(), log_p, ENUMERATED) * value
        score, chance = log_prob(log_q, y), log_prob(log_q, y).sum().exp().detach()
        later = [sum(discount ** (s - t) * cost[s].detach() for s in range(t + 1, len(y))) for t in range(len(y))]
        (chance * (cost.sum() + sum(a * b for a, b in zip(score, later, strict=True)))).backward()
    return gradients(student)


FULL = [("full", name, discount) for name in WEIGHTINGS for discount in (0.0, 1.0)]
BY_SAMPLES = [
    (estimator, name, discount)
    for estimator in ("topk", "sampled")
    for name in ("student_entropy", "teacher_entropy", "position", "agreement")
    for discount in (0.0, 1.0)
]


def enumerated(tmp_path, prompts, student, teacher, **changes):
    return after_a_step(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(tmp_path, loss_type="dr_grpo", max_completion_length=LENGTH, kl_top_k=2, **changes),
            train_dataset=prompts,
            processing_class=make_tokenizer(["<pad>", "<eos>", "a", "b", "."]),
        ),
        ENUMERATED,
    )


@pytest.mark.parametrize(("estimator", "name", "discount"), FULL + BY_SAMPLES)
def test_expected_gradient_is_that_of_the_weighted_objective(tmp_path, prompts, estimator, name, discount):
    student, teacher = tiny_model(1), tiny_model(2)
    changes = {"kl_estimator": estimator, "kl_discount": discount, **WEIGHTINGS[name]}
    found = expected_gradient(enumerated(tmp_path, prompts, student, teacher, **changes))
    assert relative_error(found, weighted_oracle(student, teacher, name, discount)) < 1e-4


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_teacher_is_a_fixed_point(tmp_path, prompts, name):
    """At KL = 0 the expected gradient is zero, at γ = 1 too."""
    student = tiny_model(1)
    changes = {"kl_discount": 1.0, "assume_different_teacher": True, **WEIGHTINGS[name]}
    trainer = enumerated(tmp_path, prompts, student, copy.deepcopy(student), **changes)
    at_teacher = expected_gradient(trainer).norm()
    elsewhere = weighted_oracle(student, tiny_model(2), name, 1.0).norm()
    assert at_teacher < 1e-5 * elsewhere


# -- runs --------------------------------------------------------------------------------------------------------------


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("rewards", [False, True])
@pytest.mark.parametrize("name", ["cap, of the mean", "top_share", "student_entropy"])
def test_micro_batches_do_not_change_the_update(make, name, rewards):
    """Three steps, so that the statistics of a step are used in the next."""
    changes = {"reward_funcs": letters, "num_generations": 2, "top_k": 0} if rewards else {}
    after, logs = [], []
    for accumulation in (1, 4):
        trainer = make(
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            **WEIGHTINGS[name],
            **changes,
        )
        before = parameters(trainer.model)
        trainer.train()
        after.append(parameters(trainer.model) - before)
        logs.append([row["distill/token_weight"] for row in trainer.state.log_history if "loss" in row])
    assert relative_error(after[1], after[0]) < 1e-4
    assert logs[0] == pytest.approx(logs[1], rel=0.2)  # a mean over micro-batches, which differ in length
    assert logs[0][0] == 1  # nothing is known in the first step
    assert 0 < logs[0][1] < 1


def test_a_resumed_run_repeats_the_run(make, tmp_path):
    """The statistics come with the checkpoint."""
    changes = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", **WEIGHTINGS["cap, of the mean"]}
    whole = make(folder="whole", **changes)
    whole.train()
    resumed = make(folder="resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    kept = [trainer.loss.weighting.kept["rollouts"] for trainer in (whole, resumed)]
    assert kept[0].state() == kept[1].state()


def test_the_log_has_the_mean_weight_and_the_kl_without_weights(make):
    """What is minimised is weighted, what is logged as the KL is not."""
    plain, capped = (in_training(make(**changes)) for changes in ({}, WEIGHTINGS["cap, fixed"]))
    inputs = batch()
    losses = [trainer.rollout_loss(trainer.model, inputs) for trainer in (plain, capped)]
    found = [{k: v[-1] for k, v in trainer._metrics["train"].items()} for trainer in (plain, capped)]
    assert found[0]["distill/reverse_kl"] == pytest.approx(found[1]["distill/reverse_kl"], rel=1e-6)
    assert losses[1] < 0.9 * losses[0]
    assert found[1]["distill/loss"] == pytest.approx(losses[1].item(), rel=1e-6)
    log_q, log_p = (log_probs(m, inputs).detach() for m in (capped.model, capped.teacher.model))
    mask, divergence = inputs["completion_mask"].bool(), kl(log_q, log_p)
    weights = naive_weights("cap, fixed", divergence, log_q, log_p)[mask]
    assert found[1]["distill/token_weight"] == pytest.approx(weights.mean().item(), rel=1e-4)
    assert found[1]["distill/token_weight/below_1"] == pytest.approx((weights < 1).float().mean().item())
    assert not any("token_weight" in key for key in found[0])


def test_evaluation_does_not_count(make):
    trainer = after_a_step(make(**WEIGHTINGS["cap, of the mean"]))
    trainer.rollout_loss(trainer.model, batch())
    kept = trainer.loss.weighting.kept["rollouts"]
    before = copy.deepcopy(kept.state())
    trainer.model.eval()
    with torch.no_grad():
        trainer.rollout_loss(trainer.model, batch())
    assert kept.state() == before
    assert before["current"]


def test_several_teachers_share_one_weight(make, tmp_path, tokenizer, prompts, student, teacher):
    """Half of each: the cap is on the mean of their divergences, so their mixture stays the target."""
    other = tiny_second_teacher(teacher)
    changes = {"loss_type": "dr_grpo", "teacher_weights": {"a": 0.5, "b": 0.5}, **WEIGHTINGS["cap, fixed"]}
    trainer = in_training(
        OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model={"a": copy.deepcopy(teacher), "b": other},
            args=config(tmp_path, **changes),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    inputs = batch() | {"teacher_weights": torch.full((3, 2), 0.5)}
    trainer.rollout_loss(trainer.model, inputs).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    log_q = log_probs(trainer.model, inputs)
    divergence = sum(0.5 * kl(log_q, log_probs(judge, inputs).detach()) for judge in (teacher, other))
    weights = (0.4 / divergence.detach()).clamp(max=1)
    mask = inputs["completion_mask"]
    ((weights * divergence * mask).sum() / (3 * trainer.max_completion_length)).backward()
    assert relative_error(found, gradients(trainer.model)) < 1e-4


def tiny_second_teacher(teacher):
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    return other


def test_weights_known_ahead_cost_no_projection(make, monkeypatch):
    """The gradient of a weighting by position is formed in the forward pass; others project again."""
    from trl_distill.heads import fused

    calls = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *args: (calls.append(1), run(*args))[1])
    for name, expected in (("position", 1), ("cap, fixed", 2)):
        trainer = after_a_step(make(**WEIGHTINGS[name]))
        calls.clear()
        trainer.rollout_loss(trainer.model, batch()).backward()
        assert len(calls) == expected


def test_statistics_are_those_of_all_processes(monkeypatch):
    """Two stand-ins for processes with different tokens end with the same statistics."""
    from trl_distill.objective.weighting import make_weighting

    class Accelerator:
        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            return tensor + others

    weighting = make_weighting("cap")
    values = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    found = []
    for own, other in ((values[0], values[1]), (values[1], values[0])):
        others = tally(other)[None]
        kept = RunningStatistics()
        kept.add(LossWeighting(weighting, Accelerator(), {})._counted({"divergence": own}))
        found.append(kept.at(1).mean("divergence"))
    assert found == pytest.approx([values.mean().item()] * 2, rel=1e-5)


def test_a_served_teacher_cannot_give_entropies():
    from trl_distill.objective.weighting import make_weighting
    from trl_distill.signals import TokenLogProbs

    class Served:
        gives = TokenLogProbs

    with pytest.raises(ValueError, match="gives log-probabilities of a few ids only"):
        LossWeighting(make_weighting("teacher_entropy"), None, {"teacher": Served()})
    LossWeighting(make_weighting("student_entropy"), None, {"teacher": Served()})


@pytest.mark.parametrize("name", ["full", "topk", "sampled"])
def test_what_else_is_measured_at_every_token(name):
    """The teacher's entropy over the shared ids, and agreement with merged stop tokens."""
    from helpers import make_model

    from trl_distill.heads.lm_head import LMHead
    from trl_distill.signals import HiddenStates

    generator = torch.Generator().manual_seed(0)
    student, teacher = make_model("tied", seed=1), make_model("softcap", seed=2, hidden_size=24, vocab_size=VOCAB)
    hidden = torch.randn(400, 16, generator=generator)
    signal = HiddenStates(torch.randn(400, 24, generator=generator), LMHead(teacher))
    head, stops = LMHead(student), list(range(12))
    estimator = make_estimator(
        name, "reverse_kl", 0.7, 3, stops=stops, also=frozenset({"teacher_entropy", "agreement"})
    )
    found = estimator.measure(hidden, head, signal, torch.zeros(400).long(), None)
    log_q, log_p = ((x / 0.7).log_softmax(-1) for x in (head.logits(hidden), signal.head.logits(signal.hidden)))
    torch.testing.assert_close(found.teacher_entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
    ours, theirs = (x.argmax(-1) for x in (log_q, log_p))
    expected = (ours == theirs) | ((ours < 12) & (theirs < 12))
    assert torch.equal(found.agreement.bool(), expected)
    assert 0 < (ours == theirs).sum() < expected.sum() < 400

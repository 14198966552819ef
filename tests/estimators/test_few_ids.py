"""One projection of each head for `topk` and `sampled`, also where the policy loss shares it: the same gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import VOCAB, make_model, relative_error

from trl_distill.estimators import make_estimator
from trl_distill.estimators.log_probs import FromLogProbs
from trl_distill.heads import tiles
from trl_distill.heads.comparison import compared_positions, comparison_from_states
from trl_distill.heads.few_ids import few_ids_of_both, log_probs_of, top_ids
from trl_distill.heads.fused import ExpectedSlopes
from trl_distill.heads.lm_head import LMHead
from trl_distill.heads.tiles import Projection, TileSizes
from trl_distill.signals import HiddenStates, TokenLogProbs


TOKENS = 13
STOPS = [1, 5]
ESTIMATORS = [("sampled", "reverse_kl"), ("topk", "reverse_kl"), ("topk", "forward_kl")]


@pytest.fixture(params=["one tile", "small tiles"])
def size(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "ON_CPU", TileSizes(tile=4 * VOCAB, part=3 * VOCAB, ids=7))


@pytest.fixture(params=["tied", "bias", "softcap", "scale"])
def models(request):
    """Student with bias, scale or soft cap; the teacher has a larger vocabulary."""
    student = make_model(request.param, seed=1)
    return student, make_model("untied", seed=2, hidden_size=24, vocab_size=VOCAB + 3)


def states(models, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    student, teacher = models
    hidden = torch.randn(TOKENS, 16, generator=draw).to(dtype).requires_grad_()
    signal = HiddenStates(torch.randn(TOKENS, 24, generator=draw).to(dtype), LMHead(teacher))
    sampled = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    slopes = [torch.rand(TOKENS, generator=draw) / 50, torch.randn(TOKENS, generator=draw) / 50]
    return hidden, LMHead(student), signal, sampled, slopes


def served(signal: HiddenStates, sampled: torch.Tensor, k: int) -> TokenLogProbs:
    """What a server would give: ids of the teacher's whole vocabulary, beyond the student's too."""
    log_p = signal.head.logits(signal.hidden).log_softmax(-1).detach()
    top = log_p.topk(k)
    return TokenLogProbs(log_p.gather(1, sampled[:, None])[:, 0], top.indices, top.values)


def loss_of(estimator, found, log_q, ratio, slopes):
    by_term, by_policy = slopes
    value = (by_term * estimator.term(found, log_q, ratio, None)).sum()
    return value if by_policy is None else value + (by_policy * log_q).sum()


def projected(monkeypatch) -> list[str]:
    """Names of the models whose hidden states are projected from now on."""
    seen, project = [], Projection.__call__
    monkeypatch.setattr(
        Projection, "__call__", lambda self, states: (seen.append(self.memory.name), project(self, states))[1]
    )
    return seen


@pytest.mark.parametrize(("stops", "from_server"), [([], False), (STOPS, False), ([], True)])
@pytest.mark.parametrize("rewarded", [False, True])
@pytest.mark.parametrize(("name", "divergence"), ESTIMATORS)
def test_the_foreseen_gradient_is_the_one_that_arrives(
    models, size, monkeypatch, name, divergence, rewarded, stops, from_server
):
    """On fresh rollouts; then nothing is projected in the backward pass."""
    hidden, head, signal, sampled, slopes = states(models)
    slopes = slopes if rewarded else [slopes[0], None]
    estimator = make_estimator(name, divergence, 0.8, 4, stops=stops)
    given = served(signal, sampled, 4) if from_server else signal
    inputs = [hidden, *(p for p in head.parameters() if p is not None)]

    def gradients(foreseen: bool, factor: float) -> list[torch.Tensor]:
        how = ExpectedSlopes(*slopes) if foreseen else None
        found = estimator.measure(hidden, head, given, sampled, None, slopes=how)
        log_q = found.policy_log_q
        loss = factor * loss_of(estimator, found, log_q, (log_q - log_q.detach()).exp(), slopes)
        seen.clear()
        return torch.autograd.grad(loss, inputs)

    seen = projected(monkeypatch)
    expected = gradients(False, 3.0)
    assert "student" in seen
    for ours, theirs in zip(gradients(True, 3.0), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert seen == []


@pytest.mark.parametrize("foreseen", ["right", "wrong", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_plain_projections(models, size, foreseen, temperature):
    """Whatever was foreseen."""
    hidden, head, signal, sampled, _ = states(models)
    ids, given = sampled[:, None], torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(2))
    guess = {
        "right": lambda rows, *_: 5.0 * given[rows],
        "wrong": lambda rows, *_: given[rows].flip(0) + 1.0,
        "none": None,
    }[foreseen]
    positions = compared_positions(sampled)
    found = few_ids_of_both(hidden, head, signal, ids, temperature, 3, guess, positions, tuple(STOPS))
    chosen = torch.cat([ids, top_ids(hidden, head, 3)], dim=1)
    assert found.ids.tolist() == chosen.tolist()
    expected, entropy = log_probs_of(hidden, head, chosen, head.vocab_size, temperature)
    theirs, _ = log_probs_of(signal.hidden, signal.head, chosen, head.vocab_size, temperature)
    torch.testing.assert_close(found.log_q, expected)
    torch.testing.assert_close(found.log_p, theirs)
    torch.testing.assert_close(found.entropy, entropy)
    compared = comparison_from_states(hidden, head, signal, temperature, sampled, STOPS)
    torch.testing.assert_close(found.comparison, compared, rtol=1e-4, atol=1e-5)
    plain = (head.logits(hidden) / temperature).log_softmax(-1).gather(1, chosen)
    for ours, wanted in zip(
        torch.autograd.grad((given * found.log_q).sum(), [hidden, head.parameters()[0]]),
        torch.autograd.grad((given * plain).sum(), [hidden, head.parameters()[0]]),
        strict=True,
    ):
        assert relative_error(ours, wanted) < 1e-4


@pytest.mark.parametrize(("name", "divergence"), ESTIMATORS)
def test_stale_rollouts_get_the_gradient_of_the_exact_part_alone(models, monkeypatch, name, divergence):
    """Their ratio comes from TRL's log-probabilities."""
    hidden, head, signal, sampled, slopes = states(models)
    estimator = make_estimator(name, divergence, 1.0, 4)
    trls = torch.randn(TOKENS, requires_grad=True)
    wanted = {}
    for foreseen in (False, True):
        how = ExpectedSlopes(slopes[0]) if foreseen else None
        found = estimator.measure(hidden, head, signal, sampled, trls, slopes=how)
        loss = loss_of(estimator, found, trls, trls.exp(), [slopes[0], None])
        wanted[foreseen] = torch.autograd.grad(loss, [hidden, trls], allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(wanted[True], wanted[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert bool(wanted[True][0].any()) == (name == "topk")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "divergence"), ESTIMATORS)
def test_small_slopes_do_not_underflow_in_16_bits(monkeypatch, name, divergence, dtype):
    """They are about one over the number of tokens; products of fp16 would lose them."""
    models = make_model("tied", seed=1).to(dtype), make_model("untied", seed=2, hidden_size=24).to(dtype)
    hidden, head, signal, sampled, slopes = states(models, dtype)
    slopes = [slope * 1e-6 for slope in slopes]
    estimator, gradients = make_estimator(name, divergence, 1.0, 4), []
    for foreseen in (False, True):
        how = ExpectedSlopes(*slopes) if foreseen else None
        found = estimator.measure(hidden, head, signal, sampled, None, slopes=how)
        log_q = found.policy_log_q
        loss = 1e6 * loss_of(estimator, found, log_q, (log_q - log_q.detach()).exp(), slopes)
        gradients.append(torch.autograd.grad(loss, hidden)[0].float())
    assert relative_error(gradients[1], gradients[0]) < 0.02


def test_no_gradient_is_foreseen_where_the_loss_is_not_known(models):
    """Token weights that are measured, and rollouts whose ratio is TRL's, for the sampled token alone."""
    _, head, signal, sampled, slopes = states(models)
    for estimator, fresh, how, known in (
        (make_estimator("sampled", "reverse_kl", 1.0, 0), True, ExpectedSlopes(None, slopes[1]), False),
        (make_estimator("sampled", "reverse_kl", 1.0, 0), True, None, False),
        (make_estimator("sampled", "reverse_kl", 1.0, 0), False, ExpectedSlopes(slopes[0]), False),
        (make_estimator("sampled", "reverse_kl", 1.0, 0), True, ExpectedSlopes(slopes[0]), True),
        (make_estimator("topk", "reverse_kl", 1.0, 4), False, ExpectedSlopes(slopes[0]), True),
    ):
        assert isinstance(estimator, FromLogProbs)
        assert (estimator._foreseen(head, signal, sampled, fresh, how) is not None) is known


def test_all_tokens_masked():
    models = make_model("tied", seed=1), make_model("untied", seed=2, hidden_size=24)
    hidden = torch.zeros(0, 16, requires_grad=True)
    signal, sampled = HiddenStates(torch.zeros(0, 24), LMHead(models[1])), torch.zeros(0, dtype=torch.long)
    for name, divergence in ESTIMATORS:
        estimator = make_estimator(name, divergence, 1.0, 4)
        found = estimator.measure(
            hidden, LMHead(models[0]), signal, sampled, None, ExpectedSlopes(torch.zeros(0), torch.zeros(0))
        )
        found.policy_log_q.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.shape == (0, 16)
        assert found.comparison.shape[1] == 0

"""Estimators on hidden states and log-probabilities: stop tokens as one class, forward KL, what a teacher must give."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import VOCAB, make_model, relative_error

from trl_distill.checks.teachers import check_signals
from trl_distill.estimators import make_estimator
from trl_distill.estimators.full import KERNEL_BETA
from trl_distill.heads import fused, tiles
from trl_distill.heads.lm_head import FixedHead, LMHead
from trl_distill.objective import divergences, terms
from trl_distill.objective.divergences import DIVERGENCES
from trl_distill.signals import HiddenStates, TokenLogProbs
from trl_distill.teachers.base import as_teacher


STOPS = [1, 5, 7]


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    student, teacher = make_model("tied", seed=1), make_model("softcap", seed=2, hidden_size=24)
    hidden = torch.randn(6, 16, generator=generator).requires_grad_()
    signal = HiddenStates(torch.randn(6, 24, generator=generator), LMHead(teacher))
    return hidden, LMHead(student), signal


def by_definition(divergence: str, q: torch.Tensor, p: torch.Tensor, alpha: float) -> torch.Tensor:
    """From probabilities `(N, V)`, as the papers write them."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    mean = alpha * p + (1 - alpha) * q
    return {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "jsd": lambda: alpha * kl(p, mean) + (1 - alpha) * kl(q, mean),
        "skewed_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skewed_reverse_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "mixed": lambda: alpha * kl(p, q) + (1 - alpha) * kl(q, p),
    }[divergence]()


def summed_up(log_probs: torch.Tensor) -> torch.Tensor:
    """Probabilities in which the stop ids are one."""
    others = [v for v in range(log_probs.shape[-1]) if v not in STOPS]
    return torch.cat([log_probs[:, others].exp(), log_probs[:, STOPS].exp().sum(-1, keepdim=True)], dim=-1)


FORMS = [
    *[(name, alpha) for name in ("jsd", "mixed") for alpha in (0.1, 0.5, 0.9)],
    *[(name, alpha) for name in ("skewed_forward_kl", "skewed_reverse_kl") for alpha in (0.0, 0.1, 0.6)],
    *[("reverse_kl", 0.0), ("forward_kl", 0.0)],
]


def test_every_divergence_is_held_to_its_definition():
    assert {name for name, _ in FORMS} == set(DIVERGENCES)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES.keys() - {"reverse_kl", "forward_kl"}))
def test_topk_refuses_what_it_cannot_estimate(divergence):
    """Also a divergence that somebody adds: it must not be trained as the reverse KL under another name."""
    with pytest.raises(ValueError, match="no estimate of divergence"):
        make_estimator("topk", divergence, 1.0, 4)


HOW = ["in one pass", "in two passes", "by TRL's kernel"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["tied", "bias", "softcap", "scale"])
@pytest.mark.parametrize(("divergence", "alpha"), FORMS)
def test_divergences_against_their_definitions(divergence, alpha, family, merged, how, monkeypatch):
    """Value and gradients in states, weight and bias, in tiles of two rows; the teacher's vocabulary is larger."""
    monkeypatch.setattr(tiles, "ON_CPU", replace(tiles.ON_CPU, tile=2 * VOCAB))
    if how == "by TRL's kernel":
        if divergence not in KERNEL_BETA:
            pytest.skip("TRL's kernel has no such form")
        monkeypatch.setattr("trl_distill.estimators.full.uses_kernel", lambda *_: True)
    generator = torch.Generator().manual_seed(3)
    student = make_model(family, seed=1)
    teacher = make_model("softcap", seed=2, hidden_size=24, vocab_size=VOCAB + 3)
    hidden = torch.randn(5, 16, generator=generator).requires_grad_()
    head, signal = LMHead(student), HiddenStates(torch.randn(5, 24, generator=generator), LMHead(teacher))
    estimator = make_estimator("full", divergence, 0.7, 0, alpha=alpha, stops=STOPS if merged else None)
    weights = torch.rand(5, generator=generator)
    leaves = [hidden, *(x for x in head.parameters() if x is not None)]
    slopes = fused.ExpectedSlopes(3 * weights) if how == "in one pass" else None
    found = estimator.measure(hidden, head, signal, torch.zeros(5).long(), None, slopes)
    log_q = (head.logits(hidden) / 0.7).log_softmax(-1)
    log_p = (signal.head.logits(signal.hidden)[:, :VOCAB] / 0.7).log_softmax(-1).detach()
    q, p = (summed_up(log_q), summed_up(log_p)) if merged else (log_q.exp(), log_p.exp())
    expected = by_definition(divergence, q, p, alpha)
    torch.testing.assert_close(found.divergence, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.entropy, -(log_q.exp() * log_q).sum(-1), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((weights * found.divergence).sum(), leaves, retain_graph=True)
    naive = torch.autograd.grad((weights * expected).sum(), leaves)
    for a, b in zip(ours, naive, strict=True):
        assert relative_error(a, b) < 1e-4


def test_endpoints_of_alpha():
    """As the literature and TRL have them: 0 and 1 of the JSD are the two KLs, 0 of a skewed form is the plain one."""
    generator = torch.Generator().manual_seed(0)
    log_q, log_p = torch.randn(2, 4, 9, generator=generator).log_softmax(-1)
    forward, reverse = (divergences.summands(name, log_q, log_p) for name in ("forward_kl", "reverse_kl"))
    for name, alpha, expected in (
        ("jsd", 0.0, forward),
        ("jsd", 1.0, reverse),
        ("skewed_forward_kl", 0.0, forward),
        ("skewed_reverse_kl", 0.0, reverse),
        ("mixed", 1.0, forward),
        ("mixed", 0.0, reverse),
    ):
        torch.testing.assert_close(divergences.summands(name, log_q, log_p, alpha).sum(-1), expected.sum(-1))
    with pytest.raises(ValueError, match="no divergence 'kl'"):
        divergences.summands("kl", log_q, log_p)


def merged_kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL between two distributions in which the stop ids are summed up first; from the definition."""
    return by_definition("reverse_kl", summed_up(log_a), summed_up(log_b), 0.0)


def given(hidden, head, signal, temperature=1.0):
    """Log-probabilities over the whole vocabulary, of student and teacher."""
    log_q = (head.logits(hidden) / temperature).log_softmax(-1)
    return log_q, (signal.head.logits(signal.hidden) / temperature).log_softmax(-1).detach()


def expected_over_tokens(estimator, hidden, head, signal, temperature=1.0):
    """Mean over the sampled token, enumerated, of value and gradient in the hidden states."""
    value, gradient = torch.zeros(len(hidden)), torch.zeros_like(hidden)
    for y in range(VOCAB):
        log_q, _ = given(hidden, head, signal, temperature)
        sampled, log_q_y = torch.full((len(hidden),), y), log_q[:, y]
        weight = log_q_y.detach().exp()
        ratio = (log_q_y - log_q_y.detach()).exp()
        found = estimator.term(estimator.measure(hidden, head, signal, sampled, log_q_y), log_q_y, ratio, None)
        value += weight * found.detach()
        gradient += torch.autograd.grad((weight * found).sum(), hidden)[0]
    return value, gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("name", "divergence", "k"),
    [
        *[("full", "reverse_kl", 0), ("full", "forward_kl", 0), ("sampled", "reverse_kl", 0)],
        *[("topk", "reverse_kl", k) for k in (0, 1, 4, VOCAB)],
        ("topk", "forward_kl", VOCAB),
    ],
)
def test_stop_tokens_count_as_one(heads, name, divergence, k, temperature):
    """Value and gradient of every estimator are those of the KL between the distributions with stop ids summed up."""
    hidden, head, signal = heads
    estimator = make_estimator(name, divergence, temperature, k, stops=STOPS)
    log_q, log_p = given(hidden, head, signal, temperature)
    exact = merged_kl(log_q, log_p) if divergence == "reverse_kl" else merged_kl(log_p, log_q)
    expected = torch.autograd.grad(exact.sum(), hidden)[0]
    value, gradient = expected_over_tokens(estimator, hidden, head, signal, temperature)
    tolerance = 1e-3 if (name, divergence) == ("topk", "forward_kl") else 1e-4  # nothing is left outside of its head
    torch.testing.assert_close(value, exact.detach(), rtol=tolerance, atol=1e-5)
    assert relative_error(gradient, expected) < tolerance
    apart = make_estimator(name, divergence, temperature, k)
    assert relative_error(expected_over_tokens(apart, hidden, head, signal, temperature)[1], expected) > 1e-2


def test_two_stop_tokens_of_which_each_model_knows_one():
    """The student stops with one id, the teacher with another, as surely: apart they differ much, as one not at all."""
    log_q = torch.tensor([[0.9, 1e-9, 0.1 - 1e-9]]).log()
    log_p = torch.tensor([[1e-9, 0.9, 0.1 - 1e-9]]).log()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert kl.item() > 18
    assert divergences.as_one_class(kl, log_q[:, :2], log_p[:, :2]).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("k", [0, 1, 3, 10])
def test_the_teachers_own_top_ids_give_the_same_expected_gradient(heads, k):
    """A served teacher names its own ids: the mean over the sampled token is still the exact reverse KL."""
    hidden, head, local = heads
    log_q, log_p = given(hidden, head, local)
    exact = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = torch.autograd.grad(exact.sum(), hidden)[0]

    class Served:
        """Its answer hangs on the sampled token only through that token's own log-probability."""

        def __init__(self, estimator):
            self.estimator, self.term = estimator, estimator.term

        def measure(self, hidden, head, _signal, sampled, log_q):
            top = log_p.topk(k)
            of_sampled = log_p.gather(1, sampled[:, None])[:, 0]
            signal = TokenLogProbs(of_sampled, top.indices, top.values)
            return self.estimator.measure(hidden, head, signal, sampled, log_q)

    served = Served(make_estimator("topk" if k else "sampled", "reverse_kl", 1.0, k))
    value, gradient = expected_over_tokens(served, hidden, head, local)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-4, atol=1e-5)
    assert relative_error(gradient, expected) < 1e-4


def test_forward_kl_with_a_tail_is_a_lower_bound_that_grows_with_its_head(heads):
    hidden, head, signal = heads
    log_q, log_p = given(hidden, head, signal)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    order = log_p.argsort(-1, descending=True)
    bounds = [
        terms.topk_forward_kl(log_q.gather(1, order[:, :k]), log_p.gather(1, order[:, :k])) for k in (1, 2, 4, 8, 16)
    ]
    for smaller, larger in itertools.pairwise(bounds):
        assert (larger >= smaller - 1e-6).all()
    assert (bounds[-1] <= exact + 1e-6).all()
    assert (bounds[0] > 0).all()
    full = make_estimator("full", "forward_kl", 1.0, 0)
    found = full.measure(hidden, head, signal, torch.zeros(6).long(), None).divergence
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_teacher_and_estimator_must_meet():
    class Served:
        gives, temperature = TokenLogProbs, 1.0

    teachers = {"math": as_teacher(Served())}
    with pytest.raises(
        ValueError, match=r"the teacher 'math' \(Served\) does not give. Use kl_estimator='topk' or 'sampled'"
    ):
        check_signals("full", make_estimator("full", "reverse_kl", 1.0, 0), teachers, 1.0)
    with pytest.raises(ValueError, match=r"scores at temperature 1 only, but the divergence is computed at 0\.7"):
        check_signals("topk", make_estimator("topk", "reverse_kl", 0.7, 4), teachers, 0.7)
    check_signals("topk", make_estimator("topk", "reverse_kl", 1.0, 4), teachers, 1.0)


@pytest.mark.parametrize("apart", [0.03, 0.001], ids=["KL of .009", "KL of 1.5e-5"])
@pytest.mark.parametrize("stops", [[], STOPS], ids=["stops apart", "stops merged"])
@pytest.mark.parametrize(("name", "k"), [("sampled", 0), ("topk", 4), ("full", 0)])
def test_what_16_bits_multiply_is_not_rounded_again(monkeypatch, name, k, stops, apart):
    """
    Two models that nearly agree: rounded to 16 bits before they are subtracted, logits leave nothing of the KL.

    Where GPUs would take TRL's kernel, merged stops included; its torch form rounds, so the kernel itself is left out.
    """
    if stops or name != "full":
        monkeypatch.setattr("trl_distill.estimators.full.uses_kernel", lambda *_: True)
    draw, model = torch.Generator().manual_seed(5), make_model("untied", seed=1)
    hidden = (2 * torch.randn(6, 16, generator=draw)).bfloat16()
    weights = [torch.randn(VOCAB, 16, generator=draw).bfloat16()]
    weights.append((weights[0].float() + apart * torch.randn(VOCAB, 16, generator=draw)).bfloat16())
    head, teachers = (FixedHead(model, weight, None) for weight in weights)
    exact = hidden.double().requires_grad_()
    log_q, log_p = ((exact @ weight.double().T).log_softmax(-1) for weight in weights)
    q, p = (summed_up(x) if stops else x.exp() for x in (log_q, log_p.detach()))
    kl = (q * (q.log() - p.log())).sum(-1)
    expected = torch.autograd.grad(kl.sum(), exact)[0]
    estimator = make_estimator(name, "reverse_kl", 1.0, k, stops=stops)
    value, gradient = torch.zeros(6), torch.zeros(6, 16)
    for y in range(VOCAB):
        states, sampled = hidden.clone().requires_grad_(), torch.full((6,), y)
        own = log_q[:, y].detach().float()
        measured = estimator.measure(states, head, HiddenStates(hidden, teachers), sampled, own)
        policy = measured.policy_log_q if name != "full" else own
        found = own.exp() * estimator.term(measured, policy, (policy - policy.detach()).exp(), None)
        value += found.detach()
        gradient += torch.autograd.grad(found.sum(), states)[0].float()
    torch.testing.assert_close(value.double(), kl.detach(), rtol=1e-2, atol=5e-6)
    assert relative_error(gradient, expected) < 1e-2


def test_the_tail_of_a_forward_kl_survives_16_bits():
    """It is a difference of nearly equal masses, which logits rounded to 16 bits would lose."""
    draw, model, k = torch.Generator().manual_seed(5), make_model("untied", seed=1), 4
    hidden = (4 * torch.randn(6, 16, generator=draw)).bfloat16()
    weights = [torch.randn(VOCAB, 16, generator=draw).bfloat16()]
    weights.append((weights[0].float() + 0.03 * torch.randn(VOCAB, 16, generator=draw)).bfloat16())
    exact = hidden.double().requires_grad_()
    log_q, log_p = ((exact @ weight.double().T).log_softmax(-1) for weight in weights)
    ids = log_q.topk(k).indices
    expected = terms.topk_forward_kl(log_q.gather(1, ids), log_p.detach().gather(1, ids))
    tail = 1 - log_q.exp().gather(1, ids).sum(-1)
    assert tail.min() < 1e-3  # hard enough
    states, (head, teachers) = hidden.clone().requires_grad_(), (FixedHead(model, weight, None) for weight in weights)
    estimator = make_estimator("topk", "forward_kl", 1.0, k)
    measured = estimator.measure(states, head, HiddenStates(hidden, teachers), ids[:, 0], None)
    found = estimator.term(measured, None, None, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((found, states), (expected, exact))]
    assert relative_error(*gradients) < 1e-2

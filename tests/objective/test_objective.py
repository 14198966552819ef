"""The definitions, against enumeration and known numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trl_distill.objective.divergences import reverse_kl
from trl_distill.objective.terms import future_kl, sampled_reverse_kl, topk_reverse_kl


Q = torch.tensor([0.4, 0.3, 0.2, 0.1])
P = torch.tensor([0.1, 0.2, 0.3, 0.4])

logits = hnp.arrays("float64", (3, 5), elements=st.floats(-20, 20)).map(torch.from_numpy)


def test_reverse_kl_known_value_and_gradient():
    student = Q.log().requires_grad_()
    kl = reverse_kl(student, P.log())
    kl.backward()
    assert kl.item() == pytest.approx(0.4564, abs=1e-4)
    expected = torch.tensor([0.3719, -0.0153, -0.1724, -0.1843])
    torch.testing.assert_close(student.grad, expected, atol=1e-4, rtol=0)
    # both directions have the value .4564 here, so only the gradient tells them apart
    forward_kl = torch.tensor([0.3, 0.1, -0.1, -0.3])
    assert (student.grad - forward_kl).abs().max() > 0.05


@given(logits, logits, st.floats(0.3, 3))
@settings(max_examples=50, deadline=None)
def test_reverse_kl_is_the_enumerated_sum_and_never_negative(student, teacher, temperature):
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    enumerated = sum(q[:, v] * ((q[:, v] + 1e-300).log() - (p[:, v] + 1e-300).log()) for v in range(5))
    kl = reverse_kl(student, teacher, temperature)
    torch.testing.assert_close(kl.double(), enumerated, atol=1e-4, rtol=1e-4)
    assert (kl > -1e-5).all()


@given(logits, logits)
@settings(max_examples=25, deadline=None)
def test_reverse_kl_renormalises_over_shared_ids(student, teacher):
    assert torch.equal(reverse_kl(student, teacher[:, :3]), reverse_kl(student[:, :3], teacher[:, :3]))
    assert torch.equal(reverse_kl(student[:, :3], teacher), reverse_kl(student[:, :3], teacher[:, :3]))


REVERSE, FORWARD = torch.tensor([0.3719, -0.0153, -0.1724, -0.1843]), torch.tensor([0.3, 0.1, -0.1, -0.3])


def expected_gradient(loss) -> torch.Tensor:
    """Mean over sampled tokens y ~ q of the gradient of `loss(log_q, y)` in the student's logits."""
    total = torch.zeros(4)
    for y in range(4):
        logits = Q.log().requires_grad_()
        loss(logits.log_softmax(-1), y).backward()
        total += Q[y] * logits.grad
    return total


def ratio(log_q, y):
    return torch.exp(log_q[y] - log_q[y].detach())


def topk(head: list[int]):
    def loss(log_q, y):
        outside = torch.tensor(y not in head)
        return topk_reverse_kl(log_q[head], P.log()[head], log_q[y], P.log()[y], outside, ratio(log_q, y))

    return loss


@pytest.mark.parametrize("head", [[], [0], [3], [1, 2], [0, 1, 3], [0, 1, 2, 3]], ids=str)
def test_exact_head_and_sampled_tail_have_the_right_gradient_for_every_set(head):
    """Any set that does not depend on the sampled token: the student's likeliest ids, the teacher's, or others."""
    torch.testing.assert_close(expected_gradient(topk(head)), REVERSE, atol=1e-4, rtol=0)


def test_variance_falls_as_the_head_grows():
    """Over the sampled token, averaged over 40 pairs of distributions; nothing is left with the whole vocabulary."""
    generator, size, variance = torch.Generator().manual_seed(0), 16, torch.zeros(6)
    for _ in range(40):
        start = 2 * torch.randn(size, generator=generator)
        log_p = (start + torch.randn(size, generator=generator)).log_softmax(-1)
        q = start.softmax(-1)
        for place, k in enumerate((0, 1, 2, 4, 8, size)):
            head, grads = start.topk(k).indices, []
            for y in range(size):
                logits = start.clone().requires_grad_()
                log_q = logits.log_softmax(-1)
                outside = torch.tensor(y not in head)
                topk_reverse_kl(log_q[head], log_p[head], log_q[y], log_p[y], outside, ratio(log_q, y)).backward()
                grads.append(logits.grad)
            grads = torch.stack(grads)
            variance[place] += (q @ (grads - q @ grads).square().sum(1)) / 40
    assert (variance.diff() < 0).all()
    assert variance[-1] < 1e-10


def test_sampled_estimate_and_the_wrong_forms():
    def k1(log_q, y):
        return log_q[y] - P.log()[y]

    forms = {
        "sampled": lambda log_q, y: sampled_reverse_kl(log_q[y], P.log()[y], ratio(log_q, y)),
        "k1 as a loss": k1,
        "k2 as a loss": lambda log_q, y: k1(log_q, y) ** 2 / 2,
        "k3 as a loss": lambda log_q, y: torch.exp(-k1(log_q, y)) - 1 + k1(log_q, y),
        "k2 in the reward": lambda log_q, y: ratio(log_q, y) * (k1(log_q, y) ** 2 / 2).detach(),
    }
    expected = {
        "sampled": REVERSE,
        "k1 as a loss": torch.zeros(4),
        "k2 as a loss": REVERSE,
        "k3 as a loss": FORWARD,
        "k2 in the reward": torch.tensor([0.1757, -0.1318, -0.0879, 0.0439]),
    }
    for name, form in forms.items():
        torch.testing.assert_close(expected_gradient(form), expected[name], atol=1e-4, rtol=0, msg=name)


def test_truncated_top_k_is_wrong_even_where_the_models_agree():
    def truncated(log_q, _y):
        return (log_q[:2].exp() * (log_q[:2] - Q.log()[:2])).sum()

    assert expected_gradient(truncated).abs().max() > 0.1


@given(
    hnp.arrays("float64", (2, 6), elements=st.floats(-5, 5)).map(torch.from_numpy),
    hnp.arrays("bool", (2, 6)).map(torch.from_numpy),
    st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_future_kl_is_the_discounted_sum_over_judged_tokens(values, mask, discount):
    found = future_kl(values, mask, discount)
    for row in range(2):
        judged = [t for t in range(6) if mask[row, t]]
        for place, t in enumerate(judged):
            later = judged[place + 1 :]
            expected = sum(discount ** (i + 1) * values[row, s].item() for i, s in enumerate(later))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-9)


def test_future_kl_of_a_long_row_is_finite():
    future = future_kl(torch.ones(1, 20_000), torch.ones(1, 20_000), 0.9)
    assert future[0, 0].item() == pytest.approx(9.0, rel=1e-4)

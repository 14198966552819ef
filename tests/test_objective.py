"""The definitions, against enumeration and known numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trl_distill.objective import reverse_kl


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

"""Every completion of a tiny student: probabilities, the objective's gradient, and that of the real trainer's loss.

A student over five ids writes up to three tokens, so all completions can be listed. The expected gradient of a loss is
the sum over completions of their probability times its gradient on that completion.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import EOS, gradients, make_model


V, LENGTH = 5, 3
PROMPT = [2, 4]


def completions() -> list[list[int]]:
    """Every completion of at most `LENGTH` tokens: it ends with the stop token, or is cut."""
    found = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(V), repeat=length):
            if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH):
                found.append(list(ids))
    return found


COMPLETIONS = completions()


def distributions(model, completion: list[int]) -> torch.Tensor:
    """log-probabilities over all ids at each position of a completion: `(T, V)`."""
    ids = torch.tensor([PROMPT + completion])
    return model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)


def log_prob(log_q: torch.Tensor, completion: list[int]) -> torch.Tensor:
    """log-probability of each token of a completion: `(T,)`."""
    return log_q.gather(1, torch.tensor(completion)[:, None])[:, 0]


def kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def tiny_model(seed: int):
    model = make_model("untied", seed=seed, vocab_size=V, hidden_size=8, head_dim=4)
    model.get_input_embeddings().padding_idx = None  # id 0 is an ordinary token; an embedding does not learn padding
    return model


def inputs_of(completion: list[int], **extra) -> dict[str, torch.Tensor]:
    """One row, padded to `LENGTH` on the right and by one on the left."""
    padding = [0] * (LENGTH - len(completion))
    return {
        "prompt_ids": torch.tensor([[0, *PROMPT]]),
        "prompt_mask": torch.tensor([[0, 1, 1]]),
        "completion_ids": torch.tensor([completion + padding]),
        "completion_mask": torch.tensor([[1] * len(completion) + padding]),
        "advantages": torch.zeros(1),
        "num_items_in_batch": torch.tensor(len(completion)),
        **extra,
    }


def expected_gradient(trainer, behaviour=None, inputs=inputs_of) -> torch.Tensor:
    """Σ_y probability(y) · ∇loss(y), with completions drawn from `behaviour` (default: the student)."""
    with torch.no_grad():
        weights = [log_prob(distributions(behaviour or trainer.model, y), y).sum().exp() for y in COMPLETIONS]
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    trainer.model.zero_grad()
    for y, weight in zip(COMPLETIONS, weights, strict=True):
        # dr_grpo divides the sum over tokens by the maximal length
        (trainer.rollout_loss(trainer.model, inputs(y)) * LENGTH * weight.float()).backward()
    return gradients(trainer.model)


def oracle(student, teacher, discount: float, behaviour=None) -> torch.Tensor:
    """∇KL_t at each prefix plus ρ ∇log q(y_t) times the discounted KL still to come, averaged over completions."""
    student.zero_grad()
    for y in COMPLETIONS:
        log_q = distributions(student, y)
        with torch.no_grad():
            log_p = distributions(teacher, y)
            weight = log_prob(distributions(behaviour or student, y), y).sum().exp()
            written = log_prob(distributions(behaviour or student, y), y)
        per_token, score = kl(log_q, log_p), (log_prob(log_q, y) - written).exp()  # ρ, whose gradient is ρ ∇log q
        future = [
            sum(discount ** (later - t) * per_token[later].detach() for later in range(t + 1, len(y)))
            for t in range(len(y))
        ]
        (weight * (per_token.sum() + sum(s * f for s, f in zip(score, future, strict=True)))).backward()
    return gradients(student)


def sequence_objective(student, teacher) -> torch.Tensor:
    """E Σ_t KL_t, as one differentiable number."""
    total = torch.zeros((), dtype=torch.float64)
    for y in COMPLETIONS:
        log_q, log_p = distributions(student, y), distributions(teacher, y)
        total = total + log_prob(log_q, y).sum().exp() * (log_prob(log_q, y) - log_prob(log_p, y)).sum()
    return total

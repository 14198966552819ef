"""What contenders are compared with: losses computed plainly, and bare matrix products of their sizes.

The losses come row by row from whole log-softmaxes, with none of the trainers' code. The floor is the time of the
products that no step can avoid: over real tokens, the student's backbone forward and backward, the teacher's
forward, and four projections of the LM heads (two logits, two gradients). Norms, softmaxes, the optimizer and padding
are left out of it on purpose.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from scripts.studies.benchmark.cells import Cell, Rollouts, Size, make_model, make_rollouts, projections
from scripts.studies.benchmark.clocks import now, synchronize
from scripts.studies.benchmark.contenders import BETA, reward
from trl_distill import OPDConfig
from trl_distill.objective.terms import topk_reverse_kl


TOKENS_AT_ONCE = 256


PRODUCT_ROWS = 1024  # a longer product is timed at this length, and its time scaled


@dataclass(frozen=True)
class ReferenceLosses:
    """Losses of one step by objective, as `contenders.CONTENDERS` names them, and the size of the terms they sum."""

    by_objective: dict[str, float]
    scale: float


@torch.no_grad()
def reference_losses(cell: Cell, rollouts: Rollouts, device: torch.device) -> ReferenceLosses:
    """The loss of one step on the cell's rollouts, for every objective."""
    student, teacher = (
        make_model(size, cell, seed, device).eval() for seed, size in ((1, cell.student), (2, cell.teacher))
    )
    heads = [model.get_output_embeddings().weight.float() for model in (student, teacher)]
    top = min(OPDConfig.kl_top_k, cell.vocab)
    sums = dict.fromkeys(("exact", "top-k", "k1", "k3"), 0.0)
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        ids = torch.tensor([prompt + completion], device=device)
        hidden = [
            model.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1].float()
            for model in (student, teacher)
        ]
        written = ids[0, len(prompt) :, None]  # (C, 1)
        for start in range(0, len(completion), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            log_q, log_p = ((h[rows] @ w.T).log_softmax(-1) for h, w in zip(hidden, heads, strict=True))  # (n, V)
            sampled_q, sampled_p = log_q.gather(1, written[rows])[:, 0], log_p.gather(1, written[rows])[:, 0]
            best = log_q.topk(top).indices
            outside = (best != written[rows]).all(-1)
            top_k = topk_reverse_kl(
                log_q.gather(1, best), log_p.gather(1, best), sampled_q, sampled_p, outside, torch.ones_like(sampled_q)
            )
            gap = sampled_p - sampled_q
            sums["exact"] += (log_q.exp() * (log_q - log_p)).sum().item()
            sums["top-k"] += top_k.sum().item()
            sums["k1"] -= gap.sum().item()
            sums["k3"] += (gap.exp() - gap - 1).sum().item()
    mean = {name: value / rollouts.completion_tokens for name, value in sums.items()}
    policy = {one_out: policy_loss(cell, rollouts, one_out) for one_out in (True, False)}
    by_objective = {
        "reverse KL": mean["exact"],
        "top-k KL": mean["top-k"],
        "sampled KL": mean["k1"],
        "reward and exact KL": policy[True] + BETA * mean["exact"],
        "reward and sampled KL": policy[False] + BETA * mean["k3"],
    }
    return ReferenceLosses(by_objective, mean["exact"])


def policy_loss(cell: Cell, rollouts: Rollouts, leave_one_out: bool) -> float:
    """GRPO's loss at its first iteration: minus the mean advantage of a token, over the group's mean or the others'."""
    if cell.group == 1:
        return 0.0
    rewards = torch.tensor(reward(rollouts.completions), dtype=torch.float).view(-1, cell.group)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    if leave_one_out:
        advantages *= cell.group / (cell.group - 1)
    lengths = torch.tensor([float(len(ids)) for ids in rollouts.completions])
    return -(advantages @ lengths).item() / rollouts.completion_tokens


@dataclass(frozen=True)
class Product:
    """`count` times a batched `(m, k) @ (k, n)`; of an attention that sees only the past, half is needed."""

    count: float
    m: int
    k: int
    n: int
    batch: int = 1


def products(cell: Cell, rollouts: Rollouts) -> list[Product]:
    """What a step of exact distillation has to multiply."""
    student, teacher = cell.student.hidden, cell.teacher.hidden
    rows = sorted(zip(rollouts.prompts, rollouts.completions, strict=True), key=lambda row: len(row[1]))
    found = []
    for start in range(0, cell.rows, cell.micro_batch):  # rows of like length in one forward
        forward = rows[start : start + cell.micro_batch]
        judged = sum(len(completion) for _, completion in forward)
        found += [Product(1, judged, student, cell.vocab), Product(cell.teachers, judged, teacher, cell.vocab)]
        found.append(Product(1, judged, cell.vocab, student))
        if not cell.lora:  # else the head is frozen
            found.append(Product(1, cell.vocab, judged, student))
        lengths = [len(prompt) + len(completion) for prompt, completion in forward]
        found += _backbone(cell.teacher, lengths, passes=1) * cell.teachers
        found += _backbone(cell.student, lengths, passes=2 if cell.lora else 3)
    return found


def multiplications(cell: Cell) -> float:
    """How many of them the products of a step have."""
    return sum(p.count * p.batch * p.m * p.k * p.n for p in products(cell, make_rollouts(cell)))


def _backbone(size: Size, lengths: list[int], passes: int) -> list[Product]:
    """One pass: forward; two: and gradients of activations; three: and of weights."""
    found, tokens = [], sum(lengths)
    for count, width, out in projections(size):
        forms = [(tokens, width, out), (tokens, out, width), (width, tokens, out)]
        found += [Product(count, *form) for form in forms[:passes]]
    for length in lengths:
        times = size.layers * (1 if passes == 1 else 3) / 2  # backward takes two products for each one
        found.append(Product(times, length, size.head_dim, length, size.heads))
        found.append(Product(times, length, length, size.head_dim, size.heads))
    return found


def floor_seconds(cell: Cell, rollouts: Rollouts, device: torch.device) -> float:
    """Time of all `products`, each timed on its own in the cell's dtype."""
    by_form: dict[tuple[int, int, int, int], float] = {}
    for product in products(cell, rollouts):
        form = (product.batch, product.m, product.k, product.n)
        by_form[form] = by_form.get(form, 0.0) + product.count
    dtype = getattr(torch, cell.dtype)
    return sum(count * _seconds(*form, dtype, device) for form, count in by_form.items())


def _seconds(batch: int, m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    whole = 1.0
    side = max(m, k, n)  # a head's product is cut along its tokens, the vocabulary stays whole
    if batch == 1 and side > PRODUCT_ROWS:
        every = m * k * n
        m, k, n = (size if size == side else min(size, PRODUCT_ROWS) for size in (m, k, n))
        whole = every / (m * k * n)
    left, right = (torch.randn(batch, *form, device=device).to(dtype) for form in ((m, k), (k, n)))
    if batch == 1:
        left, right = left[0], right[0]
    taken = []
    for _ in range(3):
        synchronize(device)
        begun = now()
        left @ right
        synchronize(device)
        taken.append(now() - begun)
    return statistics.median(taken) * whole

"""How student and teacher differ at a sample of the tokens, for the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..objective.divergences import as_one_class, summands
from ..signals import HiddenStates
from .lm_head import LMHead


# The models are compared at every 61st token, at most 128 tokens per micro-step, and on their 16 most likely ids
COMPARE_EVERY, COMPARE_MOST, TOP = 61, 128, 16

COMPARED = ("reverse_kl", "forward_kl", "teacher_entropy", "top1_agreement", "top_overlap")


def compared_positions(sampled: torch.Tensor) -> slice:
    """
    The judged tokens at which the models are compared: a regular sample whose start depends on the token ids.

    The step is odd, since with an even one completions of equal length would be sampled at the same positions; with a
    fixed start, small batches would be sampled at their first tokens only. At least one token is chosen if N > 0.

    Args:
        sampled (`torch.Tensor` of shape `(N,)`): ids of the judged tokens.

    Returns:
        `slice` of the N tokens.
    """
    step = max(COMPARE_EVERY, -(-len(sampled) // COMPARE_MOST)) | 1
    start = int(sampled.sum()) % min(step, len(sampled)) if len(sampled) else 0
    return slice(start, None, step)


@torch.no_grad()
def comparison(log_q: torch.Tensor, log_p: torch.Tensor, stops: Sequence[int] = ()) -> torch.Tensor:
    """
    Compare student and teacher at a few tokens, for the log.

    Args:
        log_q, log_p (`torch.Tensor` of shape `(n, V)`): log-probabilities of student and teacher.
        stops (`Sequence[int]`): ids that count as one, except in the entropy.

    Returns:
        `torch.Tensor` of shape `(len(COMPARED), n)`, fp32, in the order of `COMPARED`: both KLs and the teacher's
        entropy in nats, agreement on the most likely id (0 or 1), and the overlap of the models' `TOP` most likely ids
        as a share.
    """
    kls = [summands(name, log_q, log_p).sum(-1) for name in ("reverse_kl", "forward_kl")]
    ranked = [log_q, log_p]
    if stops:
        ours, theirs = (x[:, list(stops)] for x in ranked)
        kls = [as_one_class(kl, ours, theirs, name) for kl, name in zip(kls, ("reverse_kl", "forward_kl"), strict=True)]
        ranked = [x.index_fill(1, torch.tensor(stops, device=x.device), -torch.inf) for x in ranked]
        for x, merged in zip(ranked, (ours, theirs), strict=True):
            x[:, stops[0]] = merged.logsumexp(-1)
    likeliest = [x.topk(min(TOP, x.shape[1])).indices for x in ranked]
    common = (likeliest[0][:, :, None] == likeliest[1][:, None]).any(-1)
    return torch.stack(
        [
            *kls,
            -(log_p.exp() * log_p).sum(-1),
            (likeliest[0][:, 0] == likeliest[1][:, 0]).float(),
            common.float().mean(-1),
        ]
    )


@torch.no_grad()
def comparison_from_states(
    hidden: torch.Tensor,
    head: LMHead,
    signal: HiddenStates,
    temperature: float,
    sampled: torch.Tensor,
    stops: Sequence[int] = (),
) -> torch.Tensor:
    """
    [`comparison`] from hidden states, at the tokens that [`compared_positions`] chooses.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): the student's hidden states.
        head ([`LMHead`]): the student's.
        signal ([`~trl_distill.signals.HiddenStates`]): the teacher's, at the same N tokens.
        temperature (`float`): softmax temperature of both.
        sampled (`torch.Tensor` of shape `(N,)`): ids of the tokens.
        stops (`Sequence[int]`): ids that count as one.
    """
    chosen = compared_positions(sampled)
    shared = min(head.vocab_size, signal.head.vocab_size)
    log_q, log_p = (
        (which.logits(states[chosen].to(which.parameters()[0].device)).float()[:, :shared] / temperature).log_softmax(
            -1
        )
        for which, states in ((head, hidden), (signal.head, signal.hidden))
    )
    return comparison(log_q, log_p.to(log_q.device), stops)

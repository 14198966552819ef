"""How student and teacher differ at a sample of the tokens, for the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..objective.divergences import as_one_class, summands
from ..signals import HiddenStates
from .lm_head import LMHead
from .tiles import Projection


# Tokens of a micro-step that are compared: every ninth, but 16 or more where there are so many ...
FEW, EVERY_OF_FEW = 16, 9
# ... less often where that leaves 64 and more, every 61st of thousands, and 128 of more than that
MANY, EVERY_OF_MANY, MOST = 64, 61, 128
TOP = 16  # most likely ids

COMPARED = ("reverse_kl", "forward_kl", "teacher_entropy", "top1_agreement", "top_overlap")


def compared_positions(sampled: torch.Tensor, start: int | None = None) -> slice:
    """
    The judged tokens at which the models are compared: a regular sample whose start varies.

    To compare a token costs about a fourth of its update where models are tiny, so of 150 and more it is a ninth at
    most. The step is odd, since with an even one completions of equal length would be sampled at the same positions;
    with a fixed start, always those at the beginning.

    Args:
        sampled (`torch.Tensor` of shape `(N,)`): ids of the judged tokens.
        start (`int`, *optional*): a number that decides the start. Defaults to the sum of the ids, for which Python
            waits if they are on a GPU.

    Returns:
        `slice` of the N tokens.
    """
    count = len(sampled)
    leaves = [max(1, (count // least - 1) | 1) for least in (FEW, MANY)]  # the largest odd steps that do
    step = max(min(leaves[0], EVERY_OF_FEW), leaves[1])
    if step > EVERY_OF_MANY:
        step = max(EVERY_OF_MANY, -(-count // MOST)) | 1
    if not count:
        return slice(0, None, step)
    return slice((int(sampled.sum()) if start is None else start) % min(step, count), None, step)


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
    start: int | None = None,
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
        start (`int`, *optional*): see [`compared_positions`].
    """
    chosen = compared_positions(sampled, start)
    shared = min(head.vocab_size, signal.head.vocab_size)
    log_q, log_p = (
        fp32_logits(which, states[chosen])[:, :shared].div(temperature).log_softmax(-1)
        for which, states in ((head, hidden), (signal.head, signal.hidden))
    )
    return comparison(log_q, log_p.to(log_q.device), stops)


def fp32_logits(head: LMHead, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of a few positions: products in autocast's dtype or that of `hidden`, with fp32 sums."""
    weight, bias = head.parameters()
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        project = Projection(head, weight, bias, dtype, "student")
        return project.finish(project(hidden.to(weight.device, dtype)), temperature=1.0).clone()

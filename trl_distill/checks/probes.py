"""A few completions of the student, on which models are compared before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from ..data.sampling import Sampling, rollouts_of, sample_ids
from ..images import EncodedPrompt
from ..rollouts import Rollouts
from ..teachers.base import Teacher
from .preflight import RunFacts


PROBE_PROMPTS = 4  # prompts that the student completes to be compared with a teacher
PROBE_LENGTH = 32  # tokens of each of these completions


class Probe(NamedTuple):
    """
    A few completions.

    Attributes:
        rollouts ([`~trl_distill.Rollouts`]): as the student reads them.
        read (`dict` of [`~trl_distill.Rollouts`]): as teachers with another processor read them, by the columns of
            their prompts.
    """

    rollouts: Rollouts
    read: Mapping[str, Rollouts]

    def read_by(self, teacher: Teacher) -> Rollouts:
        """As this teacher reads them."""
        return self.read.get(teacher.prompts, self.rollouts)


def first_tokens(rollouts: Rollouts) -> Rollouts:
    """The first tokens of a few rows."""
    few = rollouts.rows(slice(PROBE_PROMPTS))
    return replace(few, mask=few.mask & (few.mask.cumsum(1) <= PROBE_LENGTH))


def own_completions(
    facts: RunFacts,
    student: nn.Module,
    accelerator: Accelerator,
    suppressed: Sequence[int] = (),
    encoders: Mapping[str, Any] | None = None,
) -> Probe:
    """
    A few completions of the student, at the run's temperature and `top_p`. Random generators are left as they were.

    Args:
        facts ([`RunFacts`]): the run. If prompts are unknown, ids of the vocabulary take the place of one.
        student (`torch.nn.Module`): the model that is trained; its weights are whole.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        suppressed (`Sequence[int]`): ids that are never sampled.
        encoders (`dict`, *optional*): of teachers with another processor, by the columns of their prompts.

    Returns:
        [`Probe`]: at most 4 rows, with up to 32 judged tokens each.
    """
    args, pad, device = facts.args, facts.tokenizer.pad_token_id, accelerator.device
    rows = facts.first_prompts(limit=PROBE_PROMPTS)
    written, tools = [prompt for prompt, _ in rows], [own for _, own in rows]
    prompts = facts.encode(written, tools) if rows else []
    if not all(prompt.ids for prompt in prompts) or not prompts:
        prompts = [prompt for prompt in prompts if prompt.ids]
        prompts, encoders = prompts or [EncodedPrompt(list(range(min(PROBE_LENGTH, len(facts.tokenizer)))))], {}
    limit = min(PROBE_LENGTH, args.max_completion_length or PROBE_LENGTH)
    how = Sampling(
        limit, tuple(facts.stops), args.temperature, seed=args.seed, suppressed=tuple(suppressed), top_p=args.top_p
    )
    with accelerator.autocast():
        completions = [ids for ((ids, _),) in sample_ids(student, prompts, pad, how)]
    read = {
        name: rollouts_of(encode(written, tools=tools), completions, pad, device)
        for name, encode in (encoders or {}).items()
    }
    return Probe(rollouts_of(prompts, completions, pad, device), read)

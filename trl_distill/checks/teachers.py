"""Check that teachers give what the estimator needs."""

from __future__ import annotations

from ..estimators.base import Estimator
from ..estimators.topk import TopK
from ..signals import AlignedLogProbs, TokenLogProbs
from ..teachers.base import Teacher, kind_of


def check_signals(name: str, estimator: Estimator, teachers: dict[str, Teacher], temperature: float) -> None:
    """Every teacher must give a signal that the estimator takes, at its temperature; raises `ValueError` otherwise."""
    for who, teacher in teachers.items():
        gives, fixed = teacher.gives, teacher.temperature
        if issubclass(gives, AlignedLogProbs) and gives not in estimator.takes:
            raise ValueError(
                "With another divergence than the reverse KL, `cross_tokenizer=True` takes the teacher's whole "
                f"distribution where both tokenizations begin anew, but the teacher {who!r} ({kind_of(teacher)}) gives "
                "log-probabilities of its own tokens only. Set `divergence='reverse_kl'`, or use a teacher in this "
                "process."
            )
        if not issubclass(gives, estimator.takes):
            raise ValueError(
                f"kl_estimator={name!r} needs hidden states and an LM head, which the teacher {who!r} "
                f"({kind_of(teacher)}) does not give. Use kl_estimator='topk' or 'sampled'."
            )
        if estimator.stops and issubclass(gives, TokenLogProbs):
            raise ValueError(
                f"Student and teacher end a turn with different ids, and the teacher {who!r} "
                f"({kind_of(teacher)}) does not give its total probability of stopping. Give both the same stop "
                "tokens, use a local teacher, or set `merge_stop_tokens=False` and watch the length of completions."
            )
        requested = teacher.top_k
        if requested is not None and isinstance(estimator, TopK) and requested != estimator.k:
            raise ValueError(
                f"The teacher {who!r} requests the {requested} most likely ids from its server, but `kl_top_k` is "
                f"{estimator.k}. Give both the same number: `{kind_of(teacher)}(..., top_k={estimator.k})`."
            )
        if fixed is not None and fixed != temperature:
            raise ValueError(
                f"The teacher {who!r} ({kind_of(teacher)}) scores at temperature {fixed:g} only, but the "
                f"divergence is computed at {temperature:g}. Set `temperature` to {fixed:g}, or use a local teacher."
            )

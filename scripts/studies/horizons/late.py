"""A reward that hangs on a late token, solved exactly: where each horizon ends, and how far that is from the optimum.

    python -m scripts.studies.horizons.late

Student and teacher are tables: for each prefix of up to five of four ids, the probabilities of the next. All
completions are listed, so what a token answers for is an expectation without noise, and nothing is trained. At a fixed
point of a horizon, q(y | prefix) ∝ p(y | prefix) e^{R_y / β − F_y}, with R_y the expected reward after y and F_y what y
answers for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from scripts.studies.horizons.horizons import HORIZONS, Horizon


IDS, LENGTH, STOP = 4, 6, 0

SPREAD = 2.0  # of the teacher's logits, so that it has likely answers

TEACHERS = 10

BETA = 0.3


@dataclass(frozen=True)
class Tree:
    """
    All prefixes and completions, with a teacher of random logits.

    Attributes:
        seed (`int`): of the teacher.
        rare (`float`): what the last token of the rewarded completion has under the teacher.
    """

    seed: int
    rare: float = 0.05

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        going_on = range(1, IDS)
        return [ids for count in range(LENGTH) for ids in itertools.product(going_on, repeat=count)]

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """That stop, or are cut at `LENGTH`."""
        stopped = [(*ids, STOP) for ids in self.prefixes]
        return stopped + [(*ids, last) for ids in self.prefixes if len(ids) == LENGTH - 1 for last in range(1, IDS)]

    @cached_property
    def places(self) -> torch.Tensor:
        """Row of `prefixes` at each place of each completion, `(N, T)`; that of the empty prefix behind its end."""
        row = {ids: i for i, ids in enumerate(self.prefixes)}
        return torch.tensor([[row[y[:t]] if t < len(y) else 0 for t in range(LENGTH)] for y in self.completions])

    @cached_property
    def written(self) -> torch.Tensor:
        """Ids of the completions, `(N, T)`."""
        return torch.tensor([[*y, *[STOP] * (LENGTH - len(y))] for y in self.completions])

    @cached_property
    def mask(self) -> torch.Tensor:
        return torch.tensor([[t < len(y) for t in range(LENGTH)] for y in self.completions])

    @cached_property
    def teacher(self) -> torch.Tensor:
        """log-probabilities, `(prefixes, IDS)`."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = SPREAD * torch.randn(len(self.prefixes), IDS, generator=generator, dtype=torch.float64)
        row = self.prefixes.index(self.rewarded_prefix(logits))
        others = logits[row, 1:].logsumexp(0)
        logits[row, 0] = torch.log(torch.tensor(self.rare / (1 - self.rare))) + others  # rare, and the stop token
        return logits.log_softmax(-1)

    def rewarded_prefix(self, logits: torch.Tensor) -> tuple[int, ...]:
        """The most likely tokens that go on."""
        ids: tuple[int, ...] = ()
        for _ in range(LENGTH - 1):
            ids = (*ids, 1 + int(logits[self.prefixes.index(ids), 1:].argmax()))
        return ids

    @cached_property
    def reward(self) -> torch.Tensor:
        """1 for one completion, `(N,)`: the most likely tokens, and a rare last one."""
        paid = (*self.rewarded_prefix(self.teacher), STOP)
        return torch.tensor([float(y == paid) for y in self.completions], dtype=torch.float64)

    def probabilities(self, log_q: torch.Tensor) -> torch.Tensor:
        """Of the completions, `(N,)`."""
        return (log_q[self.places, self.written] * self.mask).sum(1).exp()

    def optimum(self, beta: float) -> torch.Tensor:
        """π ∝ teacher · e^{r/β}, `(N,)`."""
        weights = self.probabilities(self.teacher) * (self.reward / beta).exp()
        return weights / weights.sum()


def expected(tree: Tree, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Mean of values `(N, T)` at the tokens of completions, for each prefix and id `(prefixes, IDS)`."""
    index = (tree.places * IDS + tree.written)[tree.mask]
    weights = share[:, None].expand(-1, LENGTH)[tree.mask]
    total = torch.zeros(len(tree.prefixes) * IDS, dtype=values.dtype).index_add(0, index, weights * values[tree.mask])
    mass = torch.zeros_like(total).index_add(0, index, weights)
    return (total / mass.clamp(min=1e-300)).view(-1, IDS)


def fixed_point(tree: Tree, horizon: Horizon, beta: float, steps: int = 2000, pace: float = 0.2) -> torch.Tensor:
    """
    Where training with a horizon ends, started from the teacher: log-probabilities `(prefixes, IDS)`.

    Args:
        tree ([`Tree`]): teacher and reward.
        horizon ([`Horizon`]): what a token answers for.
        beta (`float`): reward per nat.
        steps (`int`): of the damped iteration.
        pace (`float`): how far each step goes.

    Raises:
        RuntimeError: it has not come to rest.
    """
    log_q, log_p = tree.teacher, tree.teacher
    for step in range(steps):
        share = tree.probabilities(log_q)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)[tree.places] * tree.mask
        answers_for = expected(tree, horizon.future(kl, tree.mask, share[:, None]), share)
        paid = expected(tree, tree.reward[:, None].expand(-1, LENGTH), share) / beta
        if horizon.keeps_stop:  # among the tokens that go on, less their mean; the stop token answers for nothing
            others = log_q.exp()[:, 1:]
            mean = (others * answers_for[:, 1:]).sum(-1, keepdim=True) / others.sum(-1, keepdim=True)
            answers_for = torch.cat([torch.zeros_like(mean), answers_for[:, 1:] - mean], dim=-1)
        target = (log_p + paid - answers_for).log_softmax(-1)
        change = target - log_q
        log_q = (log_q + pace * change).log_softmax(-1)
        if step > 100 and change.abs().max() < 1e-9:
            return log_q
    moving = (tree.probabilities(log_q) - share).abs().sum()
    if moving > 1e-6:
        raise RuntimeError(f"{horizon.label}: after {steps} steps the probabilities still move by {moving:.1e}.")
    return log_q


def distances(seed: int, beta: float = BETA) -> dict[str, float]:
    """Total variation from the optimum, of the teacher itself ("teacher") and of each horizon's fixed point."""
    tree = Tree(seed)
    optimum = tree.optimum(beta)

    def away(log_q: torch.Tensor) -> float:
        return 0.5 * (tree.probabilities(log_q) - optimum).abs().sum().item()

    ends = {name: away(fixed_point(tree, horizon, beta)) for name, horizon in HORIZONS.items()}
    return {"teacher": away(tree.teacher), **ends}


if __name__ == "__main__":
    for seed in range(TEACHERS):
        print(seed, {name: round(value, 4) for name, value in distances(seed).items()})

"""A teacher with another tokenizer: the trainer's own loss, enumerated over every completion, against the objective.

A student over {a, b, ab} and a teacher over {a, b, ba, aa} with two stop tokens: their tokens cross ("ab|a" against
"a|ba"), and "a|b" is not how the student's tokenizer writes "ab". The formula is computed here from full logits and
from the definition of the text that the teacher reads, not from the library's spans.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers import config, gradients, in_training, relative_error
from text_models import STUDENT, TEACHER, TEACHER_STOPS, make_pair

from trl_distill import OPDTrainer
from trl_distill.alignment.completions import align
from trl_distill.estimators.cross_tokenizer import CHARGE


LENGTH, PAD, EOS = 3, 0, 1
PROMPT = "ab"
COMPLETIONS = [
    list(ids)
    for length in range(1, LENGTH + 1)
    for ids in itertools.product(range(len(STUDENT)), repeat=length)
    if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH)
]


class Texts:
    """The objective by its definition."""

    def __init__(self, student, own, teacher, other, pair):
        self.student, self.own, self.teacher, self.other, self.pair = student, own, teacher, other, pair
        self.prompts = own(PROMPT).input_ids, other(PROMPT).input_ids
        self.read: dict[tuple[int, ...], torch.Tensor] = {}

    def reading(self, ids: list[int]) -> tuple[list[int], list[bool]]:
        """The teacher's tokens for tokens of the student, piece by canonical piece, and which ones are charged."""
        done: list[int] = []
        piece: list[int] = []
        charged = []
        for token in ids:
            if token == PAD:  # special tokens are read by their content
                done, piece = [*done, *self.spelled(piece), TEACHER.index("<pad>")], []
                charged.append(False)
                continue
            grown = [*piece, token]
            text = "".join(STUDENT[i] for i in grown)
            charged.append(self.own(text).input_ids != grown)
            if charged[-1]:
                done, grown = done + self.spelled(piece), [token]
            piece = grown
        return done + self.spelled(piece), charged

    def spelled(self, ids: list[int]) -> list[int]:
        return self.other("".join(STUDENT[i] for i in ids)).input_ids if ids else []

    def log_p(self, ids: list[int], stopped: bool) -> float:
        """log p of the teacher's reading, and of any of its stop tokens behind it."""
        read, _ = self.reading(ids)
        if tuple(read) not in self.read:
            with torch.no_grad():
                logits = self.teacher(input_ids=torch.tensor([[*self.prompts[1], *read]])).logits[0]
            self.read[tuple(read)] = logits.double().log_softmax(-1)
        rows = self.read[tuple(read)]
        first = len(self.prompts[1]) - 1
        total = sum(rows[first + i, token].item() for i, token in enumerate(read))
        return total + (rows[-1, TEACHER_STOPS].logsumexp(0).item() if stopped else 0.0)

    def log_q(self, completion: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*self.prompts[0], *completion]])
        rows = self.student(input_ids=ids).logits[0, len(self.prompts[0]) - 1 : -1].double().log_softmax(-1)
        return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]

    def spans(self, completion: list[int]) -> tuple[list[int], int]:
        """Starts of spans and the end of the last whole one; each is decided by the tokens before it."""
        stopped = completion[-1] == EOS
        text = completion[: len(completion) - stopped]
        anew = [i for i in range(len(text) + 1) if i == 0 or align(self.pair, text[:i], False).end == i]
        if stopped:
            return anew, len(completion)
        return [i for i in anew if i < len(text)], anew[-1]

    def costs(self, completion: list[int], log_q: torch.Tensor) -> tuple[list[int], list[list[torch.Tensor]]]:
        """Starts of spans, and for each of their tokens what the span costs from there on."""
        stopped = completion[-1] == EOS
        text = completion[: len(completion) - stopped]
        starts, end = self.spans(completion)
        charges = [CHARGE * c for c in [*self.reading(text)[1], *([False] * stopped)]]
        found = []
        for start, until in zip(starts, [*starts[1:], len(completion)], strict=True):
            whole = until <= end
            written = self.log_p(text[:until], stopped and until == len(completion)) if whole else 0.0
            read = written - self.log_p(text[:start], False) if whole else 0.0
            found.append(
                [
                    (sum(log_q[i:until]) if whole else -sum(log_q[start:i])) - read + sum(charges[i:until])
                    for i in range(start, until)
                ]
            )
        return starts, found

    def formula(self, discount: float) -> torch.Tensor:
        """E Σ_i ∇log q_i (its span's cost from there on + later spans', discounted; less 1 if it is not counted)."""
        self.student.zero_grad()
        for completion in COMPLETIONS:
            log_q = self.log_q(completion)
            weight = log_q.sum().exp().detach()
            starts, costs = self.costs(completion, log_q.detach())
            _, end = self.spans(completion)
            total = torch.zeros((), dtype=torch.float64)
            for number, start in enumerate(starts):
                later = sum(discount ** (k - number) * costs[k][0] for k in range(number + 1, len(starts)))
                for i, own in enumerate(costs[number]):
                    total = total + log_q[start + i] * (own + later - float(start + i >= end))
            (weight * total).backward()
        return gradients(self.student)

    def objective(self) -> torch.Tensor:
        """E[log q − log p + charges] over all completions, as one differentiable number."""
        total = torch.zeros((), dtype=torch.float64)
        for completion in COMPLETIONS:
            log_q = self.log_q(completion)
            _, costs = self.costs(completion, log_q)
            total = total + log_q.sum().exp() * sum(span[0] for span in costs)
        return total


RULES = ["closed", "everywhere"]
SETS = ["closed", "shared", "none", "one"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trainer, its objective, and the tokenizers as they were compared; made once, since it takes seconds."""
    folder = tmp_path_factory.mktemp("texts")
    student, own, teacher, other = make_pair(folder / "teacher")
    settings = {"loss_type": "dr_grpo", "max_completion_length": LENGTH, "top_k": 0, "num_generations": 2}
    trainer = in_training(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(folder, cross_tokenizer=True, **settings),
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 8}),
            processing_class=own,
        )
    )
    judge = trainer.teacher
    return trainer, Texts(student, own, judge.module, other, judge.pair), judge.pair, judge.shared


@pytest.fixture
def build(made):
    def make(rule: str = "closed", exact: str = "closed", kl_discount: float = 0.0, beta: float = 1.0):
        trainer, texts, pair, shared = made
        texts.student.float()
        trainer.args.kl_discount, trainer.args.beta, trainer.has_rewards = kl_discount, beta, False
        trainer.estimator.charge = CHARGE
        if rule == "everywhere":
            pair = dataclasses.replace(pair, unfinished=frozenset())
        both = pair.shared if exact == "shared" else pair.closed
        both = {v: w for v, w in both.items() if v != EOS and exact != "none" and (exact != "one" or v == 2)}
        ids = torch.tensor(list(both.items()), dtype=torch.long).view(-1, 2)
        texts.pair = trainer.teacher.pair = pair
        trainer.teacher.shared = dataclasses.replace(shared, student=ids[:, 0], teacher=ids[:, 1])
        return trainer, texts

    return make


def inputs_of(texts: Texts, completion: list[int], **extra):
    """One row, padded on both sides; the teacher's prompt is in its own tokens."""
    padding = [0] * (LENGTH - len(completion))
    own, other = texts.prompts
    return {
        "prompt_ids": torch.tensor([[0, *own]]),
        "prompt_mask": torch.tensor([[0, *[1] * len(own)]]),
        "text_prompt_0_ids": torch.tensor([[0, 0, *other]]),
        "text_prompt_0_mask": torch.tensor([[0, 0, *[1] * len(other)]]),
        "completion_ids": torch.tensor([completion + padding]),
        "completion_mask": torch.tensor([[1] * len(completion) + padding]),
        "advantages": torch.zeros(1),
        "num_items_in_batch": torch.tensor(len(completion)),
        **extra,
    }


def expected_gradient(trainer, texts: Texts, rewards=None) -> torch.Tensor:
    """Σ_y q(y) ∇loss(y), by the trainer's own loss."""
    with torch.no_grad():
        weights = [texts.log_q(y).sum().exp() for y in COMPLETIONS]
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    trainer.model.zero_grad()
    for y, weight in zip(COMPLETIONS, weights, strict=True):
        extra = {} if rewards is None else {"advantages": torch.tensor([rewards(y)])}
        loss = trainer.rollout_loss(trainer.model, inputs_of(texts, y, **extra))
        (loss * LENGTH * weight.float()).backward()
    return gradients(trainer.model)


def test_the_example_has_what_it_is_for(build):
    """Crossed tokens, several readings, tokens off the path, spans of several tokens, cut spans."""
    _, texts = build("everywhere")
    pair = texts.pair
    aligned = [align(pair, [i for i in y if i != EOS], y[-1] == EOS) for y in COMPLETIONS]
    assert any(len(one.paths) > 1 for one in aligned)
    assert any(any(one.charged) for one in aligned)
    _, texts = build("closed")
    aligned = [align(texts.pair, [i for i in y if i != EOS], y[-1] == EOS) for y in COMPLETIONS]
    assert any(one.end < len(y) for one, y in zip(aligned, COMPLETIONS, strict=True))
    assert any(not all(one.single) for one in aligned)
    assert 0 < len(texts.pair.closed) < len(texts.pair.shared)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rule", "exact"), [*[("closed", one) for one in SETS], ("everywhere", "shared")])
def test_expected_gradient_is_that_of_the_formula(build, rule, exact, discount):
    trainer, texts = build(rule, exact, kl_discount=discount)
    assert relative_error(expected_gradient(trainer, texts), texts.formula(discount)) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_at_discount_one_the_formula_is_the_gradient_of_the_objective(build, rule):
    """
    By autograd of the enumerated objective, and by finite differences of it.

    Those are along a direction of the LM head, behind which all is in fp64: the model's norms compute in fp32 whatever
    its dtype, and with them in between the differences are rounded by more than the tolerance.
    """
    _, texts = build(rule)
    student = texts.student.double()
    found = texts.formula(1.0)
    student.zero_grad()
    texts.objective().backward()
    assert relative_error(found, gradients(student)) < 1e-5
    generator = torch.Generator().manual_seed(0)
    parts = [(name, torch.randn(p.shape, generator=generator).double()) for name, p in student.named_parameters()]
    direction = torch.cat([(x if name == "lm_head.weight" else 0 * x).flatten() for name, x in parts])
    assert len(found) == len(direction)
    assert direction.any()
    values = []
    for step in (2e-6, -2e-6):
        with torch.no_grad():
            start = torch.nn.utils.parameters_to_vector(student.parameters())
            torch.nn.utils.vector_to_parameters(start + step * direction, student.parameters())
            values.append(texts.objective().item())
            torch.nn.utils.vector_to_parameters(start, student.parameters())
    assert (values[0] - values[1]) / 4e-6 == pytest.approx((found @ direction).item(), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_reward_and_teacher_together(build, rule):
    """The expected gradient of the whole loss is that of −(E[r] − β J), with the reward as advantage."""
    beta = 0.5
    trainer, texts = build(rule, kl_discount=1.0, beta=beta)
    trainer.has_rewards = True

    def reward(y: list[int]) -> float:
        return float(y[0] == 2) + 0.5 * float(len(y) > 1 and y[1] == 3)

    found = expected_gradient(trainer, texts, reward)
    texts.student.zero_grad()
    expected = sum(texts.log_q(y).sum().exp() * reward(y) for y in COMPLETIONS)
    (beta * texts.objective() - expected).backward()
    assert relative_error(found, gradients(texts.student)) < 1e-4


def test_the_mean_of_the_loss_is_the_objective(build):
    trainer, texts = build("closed")
    with torch.no_grad():
        mean = sum(
            texts.log_q(y).sum().exp() * trainer.rollout_loss(trainer.model, inputs_of(texts, y)) * LENGTH
            for y in COMPLETIONS
        )
        assert mean.item() == pytest.approx(texts.objective().item(), rel=1e-4)
    assert math.isfinite(mean.item())


def test_the_formula_can_fail(build):
    """Another discount, and no charge, are told apart."""
    trainer, texts = build("closed", kl_discount=1.0)
    found = expected_gradient(trainer, texts)
    assert relative_error(found, texts.formula(0.0)) > 0.01
    trainer.estimator.charge = 0.0
    assert relative_error(expected_gradient(trainer, texts), texts.formula(1.0)) > 0.05

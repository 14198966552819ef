"""How often Python would wait for a GPU within a micro-step: exact numbers, with the reason for each.

Counted on a CPU, see `synchronisations.py`. What is left of ours is at two points, where the device has little to do:
between forward and backward pass, and at the first node of the backward pass.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EOS, config
from synchronisations import Synchronisations

from trl_distill import OPDTrainer
from trl_distill.heads.comparison import EVERY_OF_MANY
from trl_distill.models import hidden_states


OURS = {
    "fused.py as_expected: tolist": 1,  # whether the backward pass must project again
    "metrics.py means: tolist": 1,  # the log
    "safeguards.py check_loss: item": 1,  # a loss that is NaN is not trained on
}


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(reward_funcs=None, **changes):
        settings = {"gradient_accumulation_steps": 2, "max_completion_length": 16, **changes}
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=reward_funcs,
            args=config(tmp_path, **settings),
            train_dataset=prompts,
            processing_class=tokenizer,
        )

    return build


def length(completions, **_):
    return [float(len(text)) for text in completions]


def of_a_micro_step(trainer, which: int = 3) -> dict[str, int]:
    """What is counted in one micro-step that does not generate, after checks on first batches are done."""
    step, seen, found = trainer.training_step, [0], {}

    def counted(*args, **kwargs):
        if seen[0] != which:
            seen[0] += 1
            return step(*args, **kwargs)
        seen[0] += 1
        with Synchronisations("/trl_distill/", "/trl/", "/transformers/") as mode:
            result = step(*args, **kwargs)
        found.update(mode.found)
        return result

    trainer.training_step = counted
    trainer.train()
    assert seen[0] > which
    return found


def without_libraries(found: dict[str, int]) -> dict[str, int]:
    """Less those of transformers, which looks for padding in a mask, and of TRL's policy loss, which logs ratios."""
    theirs = ("masking_utils.py", "grpo_trainer.py", "utils.py nan")
    return {place: number for place, number in found.items() if not place.startswith(theirs)}


@pytest.mark.parametrize(
    "changes", [{}, {"kl_estimator": "topk"}, {"num_iterations": 2}], ids=["full", "topk", "twice"]
)
def test_a_micro_step_waits_three_times(make, changes):
    assert without_libraries(of_a_micro_step(make(**changes))) == OURS


def test_with_rewards_too(make):
    assert without_libraries(of_a_micro_step(make(reward_funcs=length, num_generations=4))) == OURS


def test_packed_rows_are_found_without_waiting(make, monkeypatch):
    monkeypatch.setattr(hidden_states, "packs", lambda model: True)
    assert without_libraries(of_a_micro_step(make())) == OURS


def test_every_start_comes_in_turn(make):
    """The tokens that are compared begin at another place in each step, also where completions are equally long."""
    trainer = make()
    starts = []
    for step in range(61):
        trainer.state.global_step = step
        starts.append(trainer.loss._start)
    for distance in range(1, EVERY_OF_MANY + 1, 2):
        assert {start % distance for start in starts[:distance]} == set(range(distance))


def test_what_is_counted():
    """Every way to bring a number to Python."""
    values, mask = torch.arange(6.0).view(2, 3), torch.tensor([[True, False, True], [False, True, True]])
    with Synchronisations("/test_synchronisations.py") as mode:
        assert values.sum().item() == 15
        assert bool(mask.any())
        values[mask].sum()
        values.tolist()
        values.cpu()
        mask.nonzero()
        values.unique()
        values[torch.tensor([0])]  # no mask
    here = "test_synchronisations.py test_what_is_counted"
    assert {name.removeprefix(f"{here}: "): number for name, number in mode.found.items()} == {
        **{"item": 2, "boolean index": 1, "tolist": 1, "cpu": 1, "nonzero": 1, "_unique2": 1},
    }
    assert "tolist" not in vars(torch.Tensor)

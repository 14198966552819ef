"""What a baseline could take away of a reward's noise: known where rewards are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.studies.often_wrong import explained as study


ROOT = Path(__file__).parents[2]


def made_up(chances: torch.Tensor, tells: bool, draw: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """24 answers of 1 to 3 tokens for each chance; hidden states hold the chance, and the last one the reward."""
    found = []
    for chance in chances:
        rewards = (torch.rand(24, generator=draw) < chance).float()
        states = torch.randn(24, 3, 4, generator=draw)
        states[:, 0] = torch.randn(4, generator=draw)  # all answers start from one prompt
        states[:, 0, 0] = chance if tells else 0.0
        if tells:
            states[:, 0, 1], states[:, 1:, 0], states[:, 1:, 1] = 0.5, 0.5, rewards[:, None]
        states[::2, 2] = torch.nan
        found.append((rewards, states))
    return found


def test_variance_between_problems_is_told_from_that_of_sampling():
    draw = torch.Generator().manual_seed(0)
    chances = torch.rand(40_000, generator=draw)  # of uniform chances 1/12 of 1/4 lies between problems
    rewards = (torch.rand(40_000, 4, generator=draw) < chances[:, None]).float()
    assert study.between(rewards) == pytest.approx(1 / 3, abs=0.01)
    alike = (torch.rand(40_000, 4, generator=draw) < 0.5).float()
    assert study.between(alike) == pytest.approx(0, abs=0.01)


def test_a_head_explains_what_states_tell_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    chances = torch.rand(300, generator=draw)
    told = study.explained(made_up(chances, True, draw))
    assert told.prompt == pytest.approx(told.problem, abs=0.05)
    assert told.tokens > told.prompt + 0.1
    silent = study.explained(made_up(chances, False, draw))
    assert silent.problem == pytest.approx(1 / 3, abs=0.06)
    assert silent.prompt < 0.02
    assert silent.tokens < 0.02


def test_the_page_shows_what_was_measured():
    known = {name: study.Explained(**one) for name, one in json.loads(study.RESULTS.read_text()).items()}
    assert study.table(known) in (ROOT / "docs" / "results.md").read_text()

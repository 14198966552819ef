"""Which pairs of answers are compared, and the scores that outcomes lead to."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import minimize

from trl_distill.synthetic.stages.ranking import bradley_terry, chosen_pairs


@pytest.mark.parametrize("answers", range(1, 12))
def test_chosen_pairs_connect_all_answers(answers):
    everything = answers * (answers - 1) // 2
    for comparisons in (max(1, answers - 1), answers, None, 10**6):
        pairs = chosen_pairs(answers, comparisons, seed=3)
        most = 3 * answers if comparisons is None else comparisons
        assert len(pairs) == len(set(pairs)) == min(most, everything)
        assert all(0 <= a < b < answers for a, b in pairs)
        reached = {0}
        for _ in range(answers):
            reached |= {place for pair in pairs if reached & {*pair} for place in pair}
        assert reached == {*range(answers)}
        if comparisons is None and answers > 7:
            assert {sum(place in pair for pair in pairs) for place in range(answers)} == {6}
    assert len(chosen_pairs(7, None, 0)) == 21
    assert chosen_pairs(9, 8, seed=1) != chosen_pairs(9, 8, seed=2)


@pytest.mark.parametrize(("wins", "losses", "prior"), [(3, 1, 0.5), (5, 0, 0.5), (2, 2, 1.0), (7, 3, 1e-9)])
def test_two_answers_have_scores_in_closed_form(wins, losses, prior):
    outcomes = [(0, 1, 1.0)] * wins + [(1, 0, 1.0)] * losses
    half = math.log((wins + prior) / (losses + prior)) / 2
    assert bradley_terry(2, outcomes, prior) == pytest.approx([half, -half], abs=1e-8)


def test_many_answers_have_the_scores_of_the_highest_likelihood():
    outcomes = [(0, 1, 1.0), (1, 2, 0.5), (2, 3, 1.0), (3, 0, 0.0), (0, 2, 1.0), (1, 0, 1.0)]

    def loss(scores):
        log_odds = lambda a, b: math.log1p(math.exp(scores[b] - scores[a]))  # noqa: E731
        data = sum(won * log_odds(a, b) + (1 - won) * log_odds(b, a) for a, b, won in outcomes)
        pairs = {tuple(sorted(pair[:2])) for pair in outcomes}
        return data + sum(0.5 * (log_odds(a, b) + log_odds(b, a)) for a, b in pairs) + 1e-9 * sum(scores) ** 2

    best = minimize(loss, [0.0] * 4, tol=1e-12).x
    found = bradley_terry(4, outcomes)
    assert found == pytest.approx(best - best.mean(), abs=1e-4)
    assert sum(found) == pytest.approx(0, abs=1e-8)


def test_answers_that_nothing_connects_have_scores_of_their_own():
    found = bradley_terry(5, [(0, 1, 1.0), (2, 3, 1.0)])
    assert found == pytest.approx([math.log(3) / 2, -math.log(3) / 2] * 2 + [0.0])

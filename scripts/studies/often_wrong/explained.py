"""How much of a reward's noise a baseline could take away that knows the prompt, or the tokens so far.

    python -m scripts.studies.often_wrong.explained        # five minutes of one core; the table in docs/results.md

A value head predicts the reward from the student's hidden states. How well it can is measured without training it
along: answers of the student and of the three teachers, as stages of a training, and a ridge regression of their
rewards on hidden states, fitted on some problems and tried on others. `reward_baseline="batch"` leaves all of the
variance, `"prompt"` in the best case what the problem does not explain.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from scripts.studies.demo.student import load, sample
from scripts.studies.often_wrong.teachers import LEVELS, load_teacher, make_teachers
from scripts.studies.reproduce.models import be_quiet
from scripts.studies.tasks.additions import correct, problems
from scripts.studies.tasks.seeds import HELD_OUT
from scripts.studies.tasks.table import SHIPPED
from trl_distill import foreign_text
from trl_distill.models.properties import backbone_of


ROOT = Path(__file__).parents[3]

RESULTS = ROOT / "docs" / "results" / "often_wrong" / "explained.json"

PROBLEMS, ANSWERS = 240, 16

RIDGE = 1.0  # in units of the mean square of a feature


@dataclass(frozen=True)
class Explained:
    """
    Shares of the variance of a model's rewards, 0 to 1.

    Attributes:
        right (`float`): mean reward.
        problem (`float`): that the problem explains: variance between problems, less what sampling adds to it.
        prompt (`float`): that a linear head explains on new problems, at the last token of the prompt.
        tokens (`float`): the same at every token of an answer, mean over answers of the mean over their tokens.
    """

    right: float
    problem: float
    prompt: float
    tokens: float


def between(rewards: torch.Tensor) -> float:
    """The share of the variance of rewards `(P, G)` that lies between problems, unbiased in its two parts."""
    within = rewards.var(1, correction=1).mean()
    apart = rewards.mean(1).var(correction=1) - within / rewards.shape[1]
    return (apart / (apart + within)).item()


def ridge(features: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Weights `(H + 1,)` of a linear prediction from `(N, H)`, the last one its constant."""
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    scale = x[:, :-1].square().mean()
    penalty = torch.diag(torch.cat([torch.full((x.shape[1] - 1,), RIDGE * float(scale)), torch.zeros(1)]).double())
    return torch.linalg.solve(x.T @ x + penalty, x.T @ rewards.double())


def predicted(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return features.double() @ weights[:-1] + weights[-1]


@torch.no_grad()
def written(model: Any, tokenizer: Any, rows: Dataset, at_once: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    For every problem its rewards `(G,)`, and the hidden states `(G, C, H)` from which each token was drawn, NaN after
    an answer's end.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        prompts = [prompt for prompt in part["prompt"] for _ in range(ANSWERS)]
        ids, attention_mask, completions, mask = sample(model, tokenizer, prompts)
        states = backbone_of(model)(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        states = states[:, -completions.shape[1] - 1 : -1].masked_fill(~mask.bool()[..., None], torch.nan)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right = torch.tensor(correct(texts, [answer for answer in part["answer"] for _ in range(ANSWERS)]))
        found += zip(right.split(ANSWERS), states.split(ANSWERS), strict=True)
    return found


def explained(found: list[tuple[torch.Tensor, torch.Tensor]]) -> Explained:
    """A regression on two thirds of the problems, tried on the others."""
    rewards = torch.stack([right for right, _ in found])
    cut = len(found) * 2 // 3
    total = rewards[cut:].var(correction=1).item()

    first = torch.stack([states[0, 0] for _, states in found])
    weights = ridge(first[:cut], rewards[:cut].mean(1))
    left = rewards[cut:] - predicted(weights, first[cut:])[:, None]
    prompt = 1 - left.square().mean().item() / total

    made = [~states[..., 0].isnan() for _, states in found[:cut]]
    of_tokens = [right[:, None].expand(kept.shape)[kept] for (right, _), kept in zip(found, made, strict=False)]
    flat = [states[kept] for (_, states), kept in zip(found, made, strict=False)]
    weights = ridge(torch.cat(flat), torch.cat(of_tokens))
    errors = [
        (right[:, None] - predicted(weights, states)).square().nanmean(1).mean().item() for right, states in found[cut:]
    ]
    tokens = 1 - sum(errors) / len(errors) / total
    return Explained(rewards.mean().item(), between(rewards), prompt, tokens)


def table(found: dict[str, Explained]) -> str:
    """The numbers as Markdown."""
    head = ("answers of", "right", "the problem", "a head on the prompt", "a head on every token")
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        shares = (f"{round(100 * value)}%" for value in (one.right, one.problem, one.prompt, one.tokens))
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def write(found: dict[str, Explained], page: Path) -> None:
    begin, end = "<!-- often_wrong explained: begin -->", "<!-- often_wrong explained: end -->"
    text = page.read_text()
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n{table(found)}\n{end}{rest.partition(end)[2]}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("often_wrong_output"), help="for the teachers")
    parser.add_argument("--report", action="store_true", help="the table again, from what was measured")
    options = parser.parse_args(words)
    be_quiet()
    if not options.report:
        torch.manual_seed(0)
        make_teachers(options.output_dir / "teachers")
        shipped, rows = load(SHIPPED), problems(PROBLEMS, seed=HELD_OUT)
        models = {"the student": shipped.student}
        for name, level in zip(("the weakest teacher", "the middle one", "the strongest"), sorted(LEVELS), strict=True):
            models[name] = load_teacher(options.output_dir / "teachers", level)
        measured = {}
        for name, model in models.items():
            measured[name] = explained(written(model.eval(), shipped.tokenizer, rows))
            foreign_text.console().print(f"{name}: {measured[name]}", markup=False)
        RESULTS.write_text(json.dumps({name: asdict(one) for name, one in measured.items()}, indent=1) + "\n")
    known = {name: Explained(**one) for name, one in json.loads(RESULTS.read_text()).items()}
    write(known, ROOT / "docs" / "results.md")
    print(table(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The judge of `trl-distill evaluate`: scores of answers, and comparisons of two models' answers in both orders.

The same judge, questions and reading of verdicts as in `trl-distill generate`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..reporting.evaluation import Answer
from ..reporting.win_rates import Compared
from ..synthetic.config import GenerateConfig
from ..synthetic.records import Answered, AspectScores, Refusal
from ..synthetic.stages.compare import Pair, PairJudge
from ..synthetic.stages.judge_measures import comparison_measures
from ..synthetic.stages.verify import load_judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The judge's arguments."""
    add = parser.add_argument
    add("--judge", help="a model that judges: a name or folder, `vllm:name` or `http://host:port/v1#model`")
    add("--judge_mode", choices=("score", "pairwise"), default="score", help="each answer, or two models' answers")
    add("--judge_prompt", help="file with the question put to the judge; see docs/synthetic_data.md")
    add("--against", help="pairwise: the model with which the others are compared; the first unless given")
    add("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key of the judge's endpoint")


def fault(options: argparse.Namespace) -> str | None:
    """What is wrong with them."""
    if not options.judge:
        given = [name for name in ("judge_prompt", "against") if getattr(options, name)]
        given += ["judge_mode"] if options.judge_mode != "score" else []
        return f"--{given[0]} is given, but there is no --judge to ask" if given else None
    if options.judge_mode == "score":
        return "--against says with whom models are compared; add --judge_mode pairwise" if options.against else None
    if len({*options.model_name_or_path, *filter(None, [options.against])}) < 2:
        return "--judge_mode pairwise compares models, but there is one; name two, or another one as --against"
    return None


class EvaluationJudge:
    """
    A judge for the answers of an evaluation.

    Args:
        options (`argparse.Namespace`): of the command.
        rows (`list[dict]`): of the dataset; the answers are about them.

    Raises:
        ValueError: there is no such judge, or its question asks for a column that is not there.
    """

    def __init__(self, options: argparse.Namespace, rows: Sequence[dict[str, Any]]):
        self.rows, self.beside = rows, bool(options.reward_funcs)
        config = GenerateConfig(
            dataset_name=options.dataset_name,
            output_dir=str(options.output),
            teacher_model_name_or_path="model",
            completions_per_prompt=2,
            judge=options.judge,
            judge_mode=options.judge_mode,
            judge_prompt=options.judge_prompt,
            api_key_env=options.api_key_env,
        )
        self.judge = load_judge(config)
        self.judge.needs(set.intersection(*({*row} - {"prompt"} for row in rows)) if rows else set())

    @property
    def compares(self) -> bool:
        return isinstance(self.judge, PairJudge)

    def score(self, answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, int]]:
        """The answers with the judge's scores, and how many it gave none, by reason."""
        assert not isinstance(self.judge, PairJudge)
        asked = [
            Answered(row["prompt"], one.text, self._columns(row)) for one in answers for row in [self.rows[one.prompt]]
        ]
        found = self.judge.score(asked)
        self.judge.close()
        scores = [None if isinstance(s, Refusal) else s.score if isinstance(s, AspectScores) else s for s in found]
        judged = [
            replace(one, judged=score) if self.beside else replace(one, score=score)
            for one, score in zip(answers, scores, strict=True)
        ]
        return judged, dict(Counter(one.kind for one in found if isinstance(one, Refusal)))

    def compare(self, answers: Sequence[Answer], others: Sequence[Answer]) -> tuple[list[Compared], dict[str, Any]]:
        """Comparisons of answers with another model's answers in the same places, and what they show of the judge."""
        assert isinstance(self.judge, PairJudge)
        both = list(zip(answers, others, strict=True))
        rows = [self.rows[a.prompt] for a, _ in both]
        pairs = [
            Pair(row["prompt"], a.text, b.text, self._columns(row)) for row, (a, b) in zip(rows, both, strict=True)
        ]
        found = self.judge.compare(pairs)
        self.judge.close()
        measures = comparison_measures((one, len(p.a), len(p.b)) for one, p in zip(found, pairs, strict=True))
        made = zip(found, pairs, both, strict=True)
        return [Compared(a.prompt, one.outcome, len(p.a) - len(p.b)) for one, p, (a, _) in made], measures

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "prompt"}

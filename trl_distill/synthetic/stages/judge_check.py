"""How good is the judge? Accuracy on labelled rows, agreement with a verifier, bias to a place and to length.

Each row has a prompt, with `chosen` and `rejected`, or with `completion` and `label` or `score`. Rows of one prompt
with different labels make pairs, too. The judge is asked as it is for the dataset; its answers are
kept in the work folder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...data.json_rows import InputRow, read_json_rows
from ..output.counts import Skip
from ..records import Answered, AspectScores, PromptScores, Refusal, Score
from ..text import Text, flat, normal
from ..work_folder import WorkFolder, digest, file_digest, read_lines
from .compare import Comparison, Pair, PairJudge
from .judge_measures import comparison_measures, described, longer_wins, percent, rank_correlation, wilson


if TYPE_CHECKING:
    from ..config import GenerateConfig
    from .verify import RewardFunctions, Scorer


KNOWN = ("prompt", "chosen", "rejected", "completion", "label", "score")


@dataclass(frozen=True)
class Item:
    """
    A completion with what is known about it.

    Attributes:
        answered (`Answered`): the completion.
        value (`float`): its label (1 is right, 0 is wrong) or score; 1 for `chosen` and 0 for `rejected`.
        kind (`str`): "label", "score" or "pair".
        where (`str`): its row.
    """

    answered: Answered
    value: float
    kind: str
    where: str


class JudgeCheck:
    """
    The labelled rows, and what the judge says about them.

    Args:
        path (`str`): the rows.
        judge (`Scorer` or `PairJudge`): who is measured.
        verifier (`RewardFunctions`, *optional*): with whom it is compared.
        correct_from (`float`): score from which a completion is right.
        size (`int`): completions or pairs in one file of the work folder.

    Raises:
        ValueError: a row is unlike those described above, or judge or verifier ask for a column that is not there.
    """

    def __init__(
        self, path: str, judge: Scorer | PairJudge, verifier: RewardFunctions | None, correct_from: float, size: int
    ):
        self.path, self.judge, self.verifier, self.correct_from, self.size = path, judge, verifier, correct_from, size
        if not Path(path).is_file():
            raise ValueError(f"`judge_check` names {path!r}, which is not a file. Name a .jsonl file of labelled rows.")
        self.items = [item for row in read_json_rows(Path(path)) for item in _items(row)]
        self.pairs = list(_pairs(self.items))
        if isinstance(judge, PairJudge) and not self.pairs:
            raise ValueError(
                f"{path} has no pairs to compare. Give rows `chosen` and `rejected`, or one prompt several completions "
                "with different labels."
            )
        if not self.items:
            raise ValueError(f"{path} has no rows. Write labelled rows, or leave out `judge_check`.")
        columns = [set(item.answered.columns) for item in self.items]
        for one in (judge, verifier):
            if one is not None:
                one.needs(set.intersection(*columns))

    @property
    def folder(self) -> str:
        """Where the judge's answers are."""
        return f"judge_check-{digest(self.judge.identity(), file_digest(Path(self.path)), self.size, size=6).hex()}"

    @property
    def total(self) -> int:
        """How many completions are scored, or pairs compared."""
        return len(self.pairs if isinstance(self.judge, PairJudge) else self.items)

    def __len__(self) -> int:
        return math.ceil(self.total / self.size)

    def ask(self, number: int) -> Iterator[dict[str, Any]]:
        """The judge's answers about one part of the rows, as lines of JSON."""
        part = slice(number * self.size, (number + 1) * self.size)
        if isinstance(self.judge, PairJudge):
            pairs = [(self.items[a].answered, self.items[b].answered) for a, b in self.pairs[part]]
            asked = [Pair(a.prompt, a.completion, b.completion, {**b.columns, **a.columns}) for a, b in pairs]
            yield from (one.as_dict() for one in self.judge.compare(asked))
            return
        scores = self.judge.score([item.answered for item in self.items[part]])
        yield from (PromptScores(number * self.size + i, [score]).as_dict() for i, score in enumerate(scores))

    def report(self, work: WorkFolder) -> tuple[dict[str, Any], list[Skip]]:
        """What was measured, once all was asked; and what could not be read."""
        lines = [line for n in range(len(self)) for line in read_lines(work.chunk(self.folder, 0, n))]
        if isinstance(self.judge, PairJudge):
            return self._of_comparisons([Comparison.from_dict(line) for line in lines])
        return self._of_scores([PromptScores.from_dict(line).scores[0] for line in lines])

    def _of_comparisons(self, found: list[Comparison]) -> tuple[dict[str, Any], list[Skip]]:
        measured = comparison_measures((one, *self._lengths(pair)) for one, pair in zip(found, self.pairs, strict=True))
        outcomes = [one.outcome for one in found]
        skips = [
            Skip("judge check", self._where(pair), one.refusal.detail)
            for one, pair in zip(found, self.pairs, strict=True)
            if one.refusal is not None
        ]
        return {**self._of_pairs(outcomes), **measured}, skips

    def _of_scores(self, found: list[Score]) -> tuple[dict[str, Any], list[Skip]]:
        scores = [one.score if isinstance(one, AspectScores) else one for one in found]
        known = {i: score for i, score in enumerate(scores) if not isinstance(score, Refusal)}
        unread = Counter(one.kind for one in scores if isinstance(one, Refusal))
        outcomes = [_compared(known.get(a), known.get(b)) for a, b in self.pairs]
        made = {**self._of_pairs(outcomes), "scores": len(known), "no_score": dict(sorted(unread.items()))}
        made["ties"] = outcomes.count(0.5)
        made["longer_wins"] = longer_wins(
            (won, *self._lengths(pair)) for won, pair in zip(outcomes, self.pairs, strict=True)
        )
        right = [
            (score >= self.correct_from) == (self.items[i].value == 1)
            for i, score in known.items()
            if self.items[i].kind == "label"
        ]
        made["label_accuracy"] = wilson(sum(right), len(right))
        graded = [i for i in known if self.items[i].kind == "score"]
        made["score_correlation"] = rank_correlation([known[i] for i in graded], [self.items[i].value for i in graded])
        lengths = [len(self.items[i].answered.completion) for i in known]
        made["length_correlation"] = rank_correlation(list(known.values()), lengths)
        made["length_correlation_of_labels"] = rank_correlation([self.items[i].value for i in known], lengths)
        if self.verifier is not None:
            both = [
                (score >= self.correct_from) == (said >= self.correct_from)
                for i, score in known.items()
                if (said := self._verified[i]) is not None
            ]
            made["verifier_agreement"] = wilson(sum(both), len(both))
        skips = [
            Skip("judge check", self.items[i].where, one.detail)
            for i, one in enumerate(scores)
            if isinstance(one, Refusal)
        ]
        return made, skips

    def _of_pairs(self, outcomes: list[float | None]) -> dict[str, Any]:
        """Measures of pairs, whose first is the better one; accuracy is a mean over prompts, ties count half."""
        by_prompt: dict[str, list[float]] = {}
        for won, (better, _) in zip(outcomes, self.pairs, strict=True):
            if won is not None:
                by_prompt.setdefault(_key(self.items[better].answered.prompt), []).append(won)
        right = [sum(group) / len(group) for group in by_prompt.values()]
        made: dict[str, Any] = {"rows": len({item.where for item in self.items}), "pairs": len(self.pairs)}
        made["accuracy"] = wilson(sum(right), len(right))
        made["longer_is_better_in_labels"] = longer_wins((1.0, *self._lengths(pair)) for pair in self.pairs)
        if self.verifier is not None:
            said = [_compared(self._verified[a], self._verified[b]) for a, b in self.pairs]
            both = [1 - abs(x - y) for x, y in zip(outcomes, said, strict=True) if x is not None and y in (0.0, 1.0)]
            made["verifier_agreement_on_pairs"] = wilson(sum(both), len(both))
        return made

    @cached_property
    def _verified(self) -> list[float | None]:
        assert self.verifier is not None
        found = self.verifier.score([item.answered for item in self.items])
        return [score if isinstance(score, float) else None for score in found]

    def _lengths(self, pair: tuple[int, int]) -> tuple[int, int]:
        return len(self.items[pair[0]].answered.completion), len(self.items[pair[1]].answered.completion)

    def _where(self, pair: tuple[int, int]) -> str:
        return ", ".join(dict.fromkeys(self.items[place].where for place in pair))


class Loaded(Protocol):
    """What [`load_check`] needs of the settings' verifiers."""

    def __call__(self, paths: list[str]) -> RewardFunctions:
        """Reward functions by their import paths."""
        ...


def load_check(config: GenerateConfig, judge: Scorer | PairJudge | None, functions: Loaded) -> JudgeCheck | None:
    """The check that the settings ask for, or `None`."""
    if not config.judge_check or judge is None:
        return None
    verifier = functions(config.reward_funcs) if config.reward_funcs else None
    return JudgeCheck(config.judge_check, judge, verifier, config.correct_from, config.chunk_size)


def sentences(found: dict[str, Any]) -> list[str]:
    """What a check has measured, in sentences."""
    lines = [f"Judge check on {found['rows']} rows and {found['pairs']} pairs."]
    if found["accuracy"]["of"]:
        lines.append(f"It prefers the better answer for {percent(found['accuracy'])} of the prompts; ties count half.")
    if found.get("label_accuracy", {}).get("of"):
        lines.append(f"It agrees with {percent(found['label_accuracy'])} of the labels.")
    for name, what in (("score_correlation", "the labelled scores"), ("length_correlation", "length")):
        if found.get(name) is not None:
            beside = found.get("length_correlation_of_labels") if name == "length_correlation" else None
            more = "" if beside is None else f"; that of the labels with length is {beside:.2f}"
            lines.append(f"Rank correlation of its scores with {what}: {found[name]:.2f}{more}.")
    for name, what in (("verifier_agreement", "completions"), ("verifier_agreement_on_pairs", "pairs")):
        if found.get(name, {}).get("of"):
            lines.append(f"It agrees with the reward functions on {percent(found[name])} of the {what}.")
    if "comparisons" in found:
        lines += described(found)
    else:
        lines += [f"Without a score: {reason}: {count}." for reason, count in found["no_score"].items()]
        if found["longer_wins"]["of"]:
            lines.append(f"Length: the longer answer wins {percent(found['longer_wins'])} of the decided pairs.")
    if found["longer_is_better_in_labels"]["of"]:
        lines.append(f"In the labels the longer answer is better in {percent(found['longer_is_better_in_labels'])}.")
    return lines


def _compared(a: float | None, b: float | None) -> float | None:
    """What the first of two scores gets."""
    return None if a is None or b is None else 0.5 if a == b else float(a > b)


def _pairs(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """Items of one prompt with different values, the better first; `chosen` and `rejected` only with each other."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.kind == "pair" and item.value == 1:
            yield place, place + 1
        elif item.kind != "pair":
            groups.setdefault(f"{item.kind} {_key(item.answered.prompt)}", []).append(place)
    for group in groups.values():
        for i, a in enumerate(group):
            for b in group[i + 1 :]:
                if items[a].value != items[b].value:
                    yield (a, b) if items[a].value > items[b].value else (b, a)


def _key(prompt: Text) -> str:
    return normal(flat(prompt))


def _items(found: InputRow) -> Iterator[Item]:
    """The completions of one row. Raises `ValueError` where it has no label."""
    row = found.row if found.row is not None else {}
    columns = {name: value for name, value in row.items() if name not in KNOWN}
    prompt = row.get("prompt")
    if found.row is None or not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"`judge_check`, {found.where}: {found.fault or 'no `prompt`, which is text or messages'}.")

    def made(name: str, value: float, kind: str) -> Item:
        text = row[name]
        if not isinstance(text, str | list):
            raise ValueError(f"`judge_check`, {found.where}: `{name}` is {text!r}; it must be text or messages.")
        return Item(Answered(prompt, flat(text), columns), value, kind, found.where)

    if "chosen" in row and "rejected" in row:
        yield made("chosen", 1.0, "pair")
        yield made("rejected", 0.0, "pair")
        return
    kind = next((name for name in ("label", "score") if name in row), None)
    if "completion" not in row or kind is None:
        raise ValueError(
            f"`judge_check`, {found.where}: there is neither `chosen` with `rejected` nor `completion` with `label` or "
            f"`score` (columns: {', '.join(row)})."
        )
    value = row[kind]
    if not isinstance(value, int | float) or not math.isfinite(value) or (kind == "label" and value not in (0, 1)):
        wanted = "true or false" if kind == "label" else "a number"
        raise ValueError(f"`judge_check`, {found.where}: `{kind}` is {value!r}; it must be {wanted}.")
    yield made("completion", float(value), kind)

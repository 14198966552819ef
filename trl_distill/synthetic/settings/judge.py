"""Settings of the judge: how it is asked, and how it is checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from ...server_urls import without_login
from ..address import parse_address


FIXED = ()  # completions do not depend on the judge; its scores are stored by what they depend on


JUDGE_MODE = ("score", "pairwise", "aspects")


@dataclass
class JudgeSettings:
    """
    > Parameters that control the judge

    Args:
        judge (`str`, *optional*): a model that judges completions, written like a teacher.
        judge_prompt (`str`, *optional*): file with the question put to the judge. The dataset's columns are filled in,
            and `{prompt}` and, by the mode, `{completion}` ("score"; its answer must end with "Score: <number>"),
            `{first}` and `{second}` ("pairwise"; "Verdict: 1", "Verdict: 2" or "Verdict: tie"), `{completion}` and
            `{aspect}` ("aspects"; "Score: <number>").
        judge_mode (`str`, *optional*, defaults to `"score"`): `"score"`: each completion by itself; `"pairwise"`: two
            completions of a prompt at a time, in both orders, from which Bradley-Terry scores are fitted;
            `"aspects"`: a score for each aspect, and their weighted mean.
        judge_comparisons (`int`, *optional*): pairwise: comparisons of a prompt's completions, each of them two
            requests. By default all pairs of up to seven completions, and three for each completion beyond that.
        judge_aspects (`str`, *optional*): names, with weights where they are not 1: `"helpfulness=2, honesty"`.
        judge_check (`str`, *optional*): a `.jsonl` file of labelled rows on which the judge is measured: a prompt with
            `chosen` and `rejected`, or with `completion` and `label` (right or wrong) or `score`. With it,
            `reward_funcs` may stand beside the judge: they score only these rows, to be compared with it.
    """

    judge: str | None = field(default=None, metadata={"help": "Verifier: a model that judges, written like a teacher."})
    judge_prompt: str | None = field(default=None, metadata={"help": "File with the question put to the judge."})
    judge_mode: str = field(default="score", metadata={"help": "`score`, `pairwise` or `aspects`."})
    judge_comparisons: int | None = field(
        default=None, metadata={"help": "Pairwise: comparisons of a prompt's completions, each in both orders."}
    )
    judge_aspects: str | None = field(
        default=None, metadata={"help": "What is scored one by one, with weights: `helpfulness=2, honesty`."}
    )
    judge_check: str | None = field(
        default=None, metadata={"help": "Labelled .jsonl rows on which the judge is measured."}
    )

    @property
    def aspects(self) -> dict[str, float]:
        """The weight of each aspect, by its name."""
        found: dict[str, float] = {}
        for part in (self.judge_aspects or "").split(","):
            name, _, weight = map(str.strip, part.partition("="))
            if not re.fullmatch(r"\w[\w -]*", name) or name in found:
                raise ValueError(
                    f"`judge_aspects` has {part.strip()!r}, which is {'there twice' if name in found else 'no name'}. "
                    'Write names between commas, with a weight where it is not 1: "helpfulness=2, honesty".'
                )
            found[name] = _weight(name, weight) if "=" in part else 1.0
        return found

    def judge_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        config = cast(Any, self)  # all settings, of which these are a part
        if self.judge_mode not in JUDGE_MODE:
            yield f"`judge_mode={self.judge_mode!r}` is not known. Choose one of {', '.join(map(repr, JUDGE_MODE))}."
        if not self.judge:
            changed = [name for name, value in _UNUSED.items() if getattr(self, name) != value]
            if changed:
                yield f"`{changed[0]}` is given, but there is no `judge` to ask."
            return
        if parse_address(self.judge).kind != "endpoint" and "://" in self.judge:
            yield f"`judge` is {without_login(self.judge)!r}; write a URL as `http://host:port/v1#model`."
        if (self.judge_mode == "aspects") != bool(self.judge_aspects):
            yield (
                '`judge_mode="aspects"` and `judge_aspects` belong together: write both, such as '
                '`--judge_mode aspects --judge_aspects "helpfulness, honesty, truthfulness"`, or neither.'
            )
        if self.judge_mode == "aspects":
            _ = self.aspects
            if config.keep == "correct" and config.correct_from <= 1 and not self.judge_prompt:
                yield (
                    f"Aspects are scored from 1 to 5, so all completions reach `correct_from={config.correct_from:g}`. "
                    "Set `--correct_from 4`, say."
                )
        yield from self._pairwise_faults(config)

    def _pairwise_faults(self, config: Any) -> Iterator[str]:
        most = config.completions_per_prompt * (len(config.teachers) if config.asks_all else 1)
        if self.judge_mode != "pairwise":
            if self.judge_comparisons is not None:
                yield '`judge_comparisons` counts comparisons, which only `judge_mode="pairwise"` makes.'
            return
        if most < 2:
            yield '`judge_mode="pairwise"` compares completions of a prompt. Set `--num_generations 4`, say.'
        if config.keep == "correct":
            yield (
                '`keep="correct"` asks for scores of `correct_from` or more, but those of comparisons are relative: '
                "their mean is 0 for each prompt, however good its completions are. Use `--keep best` or `--pairs`, "
                'or `judge_mode="score"`.'
            )
        if self.judge_comparisons is not None and self.judge_comparisons < most - 1:
            yield (
                f"`judge_comparisons={self.judge_comparisons}` cannot connect {most} completions, so there would be "
                f"no ranking of them all. It takes at least {most - 1}."
            )


_UNUSED = {
    "judge_prompt": None,
    "judge_mode": "score",
    "judge_comparisons": None,
    "judge_aspects": None,
    "judge_check": None,
}


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"`judge_aspects` gives {name!r} the weight {text!r}. Write a number above 0.")
    return weight

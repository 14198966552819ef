"""Settings of the filters that a small model or a list can run: difficulty, language, contamination."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


FIXED = ("benchmarks",)  # the n-gram and the files' contents are part of `benchmarks_digest`


@dataclass
class FilterSettings:
    """
    > Parameters that control the filters by difficulty, language and contamination

    Args:
        difficulty_model (`str`, *optional*): name or folder of a small causal language model. It scores each row's
            instruction-following difficulty: perplexity of the completion given its prompt, divided by that of the
            completion alone (IFD, arXiv 2308.12032 and 2402.00530).
        difficulty_keep (`float`, *optional*): share of the rows that stay: those with the highest IFD below 1.
        difficulty_min (`float`, *optional*): rows with a lower IFD are dropped.
        difficulty_max (`float`, *optional*): rows with this IFD or a higher one are dropped.
        language (`list[str]`, *optional*): codes such as `en`; rows whose prompt or completion is in another language
            are dropped. Texts of fewer than 40 letters, and uncertain ones, stay.
        benchmarks (`list[str]`, *optional*): benchmarks, as `file.jsonl`, `folder`, `name` or `name:config:split` on
            the hub. Prompts and completions that share an n-gram with one are dropped.
        benchmark_ngram (`int`, *optional*, defaults to `13`): words of that n-gram.
    """

    difficulty_model: str | None = field(
        default=None, metadata={"help": "Small causal model that scores each row's difficulty (IFD)."}
    )
    difficulty_keep: float | None = field(
        default=None, metadata={"help": "Share of the rows that stay: those with the highest IFD below 1."}
    )
    difficulty_min: float | None = field(default=None, metadata={"help": "Rows with a lower IFD are dropped."})
    difficulty_max: float | None = field(
        default=None, metadata={"help": "Rows with this IFD or a higher one are dropped."}
    )
    language: list[str] | None = field(
        default=None, metadata={"help": "Languages of the rows that stay, such as `en`."}
    )
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Benchmarks with which rows must share no n-gram: files, or name:config:split."}
    )
    benchmark_ngram: int = field(default=13, metadata={"help": "Words of that n-gram."})

    def read_filter_lists(self) -> None:
        """Make lists of single values; languages may be separated by commas."""
        if isinstance(self.benchmarks, str):
            self.benchmarks = [self.benchmarks]
        if self.language:
            listed = [self.language] if isinstance(self.language, str) else self.language
            self.language = [code for part in listed for code in part.replace(",", " ").split()]

    @property
    def selects_by_difficulty(self) -> bool:
        """Whether rows are dropped for their difficulty."""
        return any(value is not None for value in (self.difficulty_keep, self.difficulty_min, self.difficulty_max))

    def filter_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        low, high = self.difficulty_min, self.difficulty_max
        if self.selects_by_difficulty and not self.difficulty_model:
            yield (
                "Rows are to be selected by difficulty, but no model measures it. Name one with `--difficulty_model`, "
                "such as a folder with a model of 100 to 500 million parameters."
            )
        if self.difficulty_keep is not None and not 0 < self.difficulty_keep <= 1:
            yield f"`difficulty_keep` is {self.difficulty_keep}; it is a share above 0 and up to 1, such as 0.2."
        if self.difficulty_keep is not None and (low is not None or high is not None):
            yield "`difficulty_keep` selects a share, `difficulty_min` and `difficulty_max` a range. Keep one."
        for name, value in (("difficulty_min", low), ("difficulty_max", high)):
            if value is not None and not value >= 0:
                yield f"`{name}` is {value}; a ratio of perplexities is never below 0."
        if low is not None and high is not None and low >= high:
            yield f"No row has a difficulty of {low} or more and below {high}. Raise `difficulty_max`."
        for code in self.language or ():
            if not re.fullmatch(r"[a-z]{2,3}", code):
                yield f"`language` names {code!r}. Write ISO 639 codes, such as `en` or `de`."
        if self.benchmark_ngram < 3:
            yield f"`benchmark_ngram` is {self.benchmark_ngram}; texts share so few words by chance. Use 8 to 13."

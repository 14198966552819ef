"""Who scores completions: reward functions, a reward model, or a judge.

What judges ask is in `judge.py`, `aspects.py` and `compare.py`. A scorer is made, and its settings are looked at,
before the first completion is. What a score is good for is decided in `select.py`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ...data.rewards import call_reward, import_reward
from ..images import with_pictures
from ..records import Answered, Refusal, Score
from ..text import as_completion
from .aspects import ASPECTS_PROMPT, AspectJudge
from .compare import PAIR_PROMPT, PairJudge
from .judge import JUDGE_PROMPT, Judge, load_judging, template_of


if TYPE_CHECKING:
    from ..config import GenerateConfig


_GIVEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # to reward functions, beside columns


class Scorer(Protocol):
    """
    Scores completions.

    Attributes:
        remote (`bool`): whether it only waits for a server, so that it may be asked from several threads.
    """

    remote: bool

    def score(self, rows: list[Answered]) -> list[Score]:
        """A finite number for each row, or why there is none."""
        ...

    def needs(self, columns: Collection[str]) -> None:
        """
        Look whether the dataset has what scoring asks for.

        Raises:
            ValueError: it has not.
        """
        ...

    def identity(self) -> list[str]:
        """What the scores depend on. A scorer with another identity scores again."""
        ...

    def close(self) -> None:
        """Give back connections."""
        ...


class RewardFunctions:
    """
    Reward functions as TRL calls them: `f(prompts=, completions=, **columns)`, which give a score for each row.

    Sync or async functions and objects that are called like one; scores as in
    [`~trl_distill.data.rewards.call_reward`]. There are no `completion_ids`: an endpoint gives text alone.

    Args:
        paths (`list[str]`): import paths. A row's score is the mean of the functions that give it one.
    """

    remote = False

    def __init__(self, paths: list[str]):
        self.functions: dict[str, Callable] = {path: import_reward(path) for path in paths}

    def needs(self, columns: Collection[str]) -> None:
        for path, function in self.functions.items():
            missing = [name for name in _required(function) if name not in {*columns, *_GIVEN}]
            if "completion_ids" in missing:
                raise ValueError(
                    f"The reward function {path!r} asks for 'completion_ids', but only the text of completions is "
                    "kept here, since endpoints give no ids. Let it use `completions`, or give the parameter a default."
                )
            if missing:
                raise ValueError(
                    f"The reward function {path!r} asks for {', '.join(map(repr, missing))}, which the dataset does "
                    f"not have (columns: {', '.join(sorted(columns)) or 'none beside the prompt'}). Add the column, or "
                    "give the parameter a default."
                )

    def close(self) -> None:
        """Nothing is held."""

    def identity(self) -> list[str]:
        return [f"{path}\n{_source(path, function)}" for path, function in self.functions.items()]

    def score(self, rows: list[Answered]) -> list[Score]:
        rows = [with_pictures(row) for row in rows]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        given: dict[str, list[Any]] = {name: [row.columns.get(name) for row in rows] for name in names}
        given["prompts"] = [row.prompt for row in rows]
        given["completions"] = [as_completion(row.completion, row.prompt) for row in rows]
        found = [self._call(path, given, len(rows)) for path in self.functions]
        scores: list[Score] = []
        for votes in zip(*found, strict=True):
            said = [vote for vote in votes if vote is not None]
            none = Refusal("no reward function gives a score", "each returned None, or something that is not a number")
            scores.append(sum(said) / len(said) if said else none)
        return scores

    def _call(self, path: str, given: dict[str, list[Any]], rows: int) -> list[float | None]:
        try:
            return call_reward(self.functions[path], rows, given, path)
        except ValueError as error:
            raise ValueError(f"{error} The completions are kept: fix it and run the same command again.") from error


class RewardModel:
    """
    A sequence-classification model with one label, whose logit is the score.

    Args:
        model (`str`): name or folder.
        batch_size (`int`): sequences in one forward.
    """

    remote = False

    def __init__(self, model: str, batch_size: int = 16):
        self.name, self.batch_size = model, batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            labels = AutoConfig.from_pretrained(model).num_labels
        except (OSError, ValueError) as error:
            raise ValueError(f"The reward model {model!r} could not be loaded: {error}") from None
        if labels != 1:
            raise ValueError(
                f"The reward model {model!r} has {labels} labels, so it is not clear which is the "
                "score. Name a model with one."
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @cached_property
    def model(self) -> Any:
        """Loaded when the first completion is scored: the teacher needs the memory until then."""
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(self.name, dtype="auto")
        loaded.config.pad_token_id = self.tokenizer.pad_token_id  # where the last token is found in a batch
        return loaded.to(self.device).eval()

    def needs(self, columns: Collection[str]) -> None:
        """Prompt and completion are enough."""

    def close(self) -> None:
        """Give back the model's memory; it is loaded again if more is to be scored."""
        self.__dict__.pop("model", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def identity(self) -> list[str]:
        return ["reward model", self.name]

    @torch.no_grad()
    def score(self, rows: list[Answered]) -> list[Score]:
        encoded = [self._encode(row) for row in rows]
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = self.tokenizer.pad({"input_ids": encoded[start : start + self.batch_size]}, return_tensors="pt")
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        not_finite = Refusal("reward model's score is not finite", "look at the model's weights and dtype")
        return [score if math.isfinite(score) else not_finite for score in scores]

    def _encode(self, row: Answered) -> list[int]:
        if isinstance(row.prompt, str):
            return self.tokenizer(row.prompt + row.completion)["input_ids"]
        messages = [*row.prompt, {"role": "assistant", "content": row.completion}]
        return self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def load_scorer(config: GenerateConfig) -> Scorer | PairJudge | None:
    """The verifier that the settings name, or `None`. A judge comes before reward functions, which then check it."""
    if config.judge:
        return load_judge(config)
    if config.reward_funcs:
        return RewardFunctions(config.reward_funcs)
    if config.reward_model:
        return RewardModel(config.reward_model, config.batch_size)
    return None


def load_judge(config: GenerateConfig) -> Judge | AspectJudge | PairJudge:
    """The judge that the settings name, and how it is asked."""
    if config.judge_mode == "pairwise":
        return PairJudge(load_judging(config), template_of(config, PAIR_PROMPT), config.judge_comparisons, config.seed)
    if config.judge_mode == "aspects":
        return AspectJudge(load_judging(config), config.aspects, template_of(config, ASPECTS_PROMPT))
    return Judge(load_judging(config), template_of(config, JUDGE_PROMPT))


def _required(function: Callable) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in by_name]


def _source(path: str, function: Callable) -> str:
    """The text of the modules that a function is named in and comes from, so that a change in them is noticed."""
    named = sys.modules.get(path.replace(":", ".").rpartition(".")[0])
    texts = dict.fromkeys(_text_of(module) for module in (named, inspect.getmodule(function)) if module is not None)
    return "\n".join(texts)


def _text_of(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""

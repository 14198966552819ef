"""Who scores completions: reward functions, a reward model, or a judge model behind an endpoint.

A scorer is made, and its settings are looked at, before the first completion is. What a score is good for is decided in
`select.py`.
"""

from __future__ import annotations

import inspect
import math
import re
import string
import threading
from collections.abc import Callable, Collection
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ...data.rewards import import_reward
from ..address import parse_address
from ..records import Answered, Refusal, Score
from ..sources.endpoint import Endpoint, RefusedError
from ..text import as_completion, flat


if TYPE_CHECKING:
    from ..config import GenerateConfig


JUDGE_PROMPT = """You are given a question and an answer to it. Judge whether the answer is right and complete.

<question>
{prompt}
</question>

<answer>
{completion}
</answer>

Think it through, then end with one line: "Score: 1" for a right answer, "Score: 0" for a wrong one."""


_SCORE = re.compile(r"score\W{0,4}[:=]\W{0,4}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Scorer(Protocol):
    """Scores completions."""

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
    Reward functions as TRL calls them: `f(prompts=, completions=, **columns)`, a number or `None` for each row.

    Args:
        paths (`list[str]`): import paths. A row's score is the mean of the functions that do not say `None`.
    """

    def __init__(self, paths: list[str]):
        self.functions: dict[str, Callable] = {path: import_reward(path) for path in paths}

    def needs(self, columns: Collection[str]) -> None:
        for path, function in self.functions.items():
            required = [
                name
                for name, parameter in inspect.signature(function).parameters.items()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            ]
            missing = [name for name in required if name not in {*columns, "prompts", "completions"}]
            if missing:
                raise ValueError(
                    f"The reward function {path!r} asks for {', '.join(map(repr, missing))}, which the dataset does "
                    f"not have (columns: {', '.join(sorted(columns)) or 'none beside the prompt'}). Add the column, or "
                    "give the parameter a default."
                )

    def close(self) -> None:
        """Nothing is held."""

    def identity(self) -> list[str]:
        return [f"{path}\n{_source(function)}" for path, function in self.functions.items()]

    def score(self, rows: list[Answered]) -> list[Score]:
        names = dict.fromkeys(name for row in rows for name in row.columns)
        given: dict[str, list[Any]] = {name: [row.columns.get(name) for row in rows] for name in names}
        given["prompts"] = [row.prompt for row in rows]
        given["completions"] = [as_completion(row.completion, row.prompt) for row in rows]
        found = [self._call(path, given, len(rows)) for path in self.functions]
        scores: list[Score] = []
        for votes in zip(*found, strict=True):
            said = [vote for vote in votes if vote is not None]
            none = Refusal("no reward function gives a score", "all of them returned None")
            scores.append(sum(said) / len(said) if said else none)
        return scores

    def _call(self, path: str, given: dict[str, list[Any]], rows: int) -> list[float | None]:
        function = self.functions[path]
        parameters = inspect.signature(function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            given = {name: value for name, value in given.items() if name in parameters}
        try:
            values = list(function(**given))
        except Exception as error:
            raise ValueError(
                f"The reward function {path!r} failed: {type(error).__name__}: {error}. The completions are kept: fix "
                "it and run the same command again."
            ) from error
        if len(values) != rows:
            raise ValueError(f"The reward function {path!r} returned {len(values)} numbers for {rows} completions.")
        for value in values:
            if value is not None and not math.isfinite(value):
                raise ValueError(f"The reward function {path!r} returned {value}. Only finite numbers can be compared.")
        return [None if value is None else float(value) for value in values]


class RewardModel:
    """
    A sequence-classification model with one label, whose logit is the score.

    Args:
        model (`str`): name or folder.
        batch_size (`int`): sequences in one forward.
    """

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
        """Its memory goes with the object."""

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


class Judge:
    """
    A model behind an endpoint that is asked about each completion and ends its answer with "Score: <number>".

    Args:
        endpoint (`Endpoint`): where it is.
        template (`str`): the question, with `{prompt}`, `{completion}` and the dataset's columns.
    """

    def __init__(self, endpoint: Endpoint, template: str = JUDGE_PROMPT):
        self.endpoint, self.template = endpoint, template
        try:
            self.fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"The judge's prompt is malformed ({error}). Write braces that are meant as such twice: {{{{ and }}}}."
            ) from None
        if "completion" not in self.fields:
            raise ValueError("The judge's prompt does not show the answer. Put `{completion}` where it belongs.")

    def needs(self, columns: Collection[str]) -> None:
        missing = sorted(self.fields - {*columns, "prompt", "completion"})
        if missing:
            raise ValueError(
                f"The judge's prompt asks for {', '.join(map(repr, missing))}, which the dataset does not have (columns"
                f": {', '.join(sorted(columns)) or 'none beside the prompt'}). Braces that are meant as such are "
                "written twice."
            )

    def close(self) -> None:
        """Connections are closed with the process: the judge is asked about several teachers' completions."""

    def identity(self) -> list[str]:
        return ["judge", self.endpoint.url, self.endpoint.model, self.template]

    def score(self, rows: list[Answered]) -> list[Score]:
        return self.endpoint.all([partial(self._one, row) for row in rows])

    def _one(self, row: Answered, halt: threading.Event) -> Score:
        question = self.template.format(**{**row.columns, "prompt": flat(row.prompt), "completion": row.completion})
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0.0}
        try:
            answer = self.endpoint.ask("/chat/completions", body, halt)
            text = answer["choices"][0]["message"]["content"] or ""
        except RefusedError as error:
            return Refusal("refused by the judge's endpoint", str(error))
        except (LookupError, TypeError) as error:
            return Refusal("judge gave no score", f"answer without text ({type(error).__name__} {error})")
        found = _SCORE.findall(text)
        return float(found[-1]) if found else Refusal("judge gave no score", f"it wrote: {text[-200:]!r}")


def load_scorer(config: GenerateConfig) -> Scorer | None:
    """The scorer that the settings name, or `None`."""
    if config.reward_funcs:
        return RewardFunctions(config.reward_funcs)
    if config.reward_model:
        return RewardModel(config.reward_model, config.batch_size)
    if config.judge:
        if config.judge_prompt and not Path(config.judge_prompt).is_file():
            raise ValueError(f"`judge_prompt` names {config.judge_prompt!r}, which is not a file.")
        template = Path(config.judge_prompt).read_text(encoding="utf-8") if config.judge_prompt else JUDGE_PROMPT
        return Judge(Endpoint.from_config(parse_address(config.judge), config), template)
    return None


def _source(function: Callable) -> str:
    """The text of the module that a function is from, so that a change in it is noticed."""
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return ""

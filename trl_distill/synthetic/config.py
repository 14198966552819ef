"""Settings of the synthetic-data pipeline, and what is wrong with them before anything is read or asked.

Which settings a restart must keep is said here too. What they do is left to the stages.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..redaction import redacted
from .address import Address, parse_address
from .settings import engine, evolve, filters, judge, revise


KEEP = ("all", "correct", "best")


ASSIGN = ("all", "rotate", "column")


# settings that the completions depend on: a restart must not change them. What follows from others is computed again
FIXED = (
    *("dataset_name", "dataset_config", "dataset_split", "max_prompts", "new_prompts", "new_prompts_seeds"),
    *("teacher_model_name_or_path", "teacher_models", "teacher_assignment", "completions_per_prompt"),
    *("max_completion_length", "temperature", "top_p", "batch_size", "chunk_size", "seed", "request_options"),
    *evolve.FIXED,
    *filters.FIXED,
    *engine.FIXED,
)


@dataclass(repr=False)
class GenerateConfig(
    evolve.EvolveSettings, revise.ReviseSettings, engine.EngineSettings, filters.FilterSettings, judge.JudgeSettings
):
    """
    Settings of `scripts/generate.py`.

    > Parameters that say what is read and written

    Args:
        dataset_name (`str`): prompts: a `.jsonl` file, a folder or a name on the hub, with a column "prompt" (text or
            messages) or "messages" that ends with the user's, and images in "image", "images" or messages. Other
            columns are kept.
        output_dir (`str`): where the dataset comes to lie. `<output_dir>.work` beside it holds what is finished.
        dataset_config (`str`, *optional*): configuration on the hub.
        dataset_split (`str`, *optional*, defaults to `"train"`): split to read.
        max_prompts (`int`, *optional*): read no further than this many prompts.
        overwrite (`bool`, *optional*, defaults to `False`): replace a dataset that this pipeline left in `output_dir`.

    > Parameters that control the teachers

    Args:
        teacher_model_name_or_path (`str`, *optional*): one teacher: a name or folder (transformers), `vllm:name` (vLLM
            in this process), or `http://host:port/v1#model` (any OpenAI-compatible endpoint).
        teacher_models (`dict` or `str`, *optional*): several, by name, as JSON. Each row names its teacher.
        teacher_assignment (`str`, *optional*, defaults to `"all"`): who completes a prompt: `"all"` of them, one after
            the other (`"rotate"`), or the one that the row's column `teacher` names (`"column"`).
        completions_per_prompt (`int`, *optional*, defaults to `1`): of each teacher.
        max_completion_length (`int`, *optional*, defaults to `1024`): tokens.
        temperature (`float`, *optional*, defaults to `1.0`): 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus.
        batch_size (`int`, *optional*, defaults to `16`): prompts in one forward; transformers only.
        chunk_size (`int`, *optional*, defaults to `64`): prompts between two points at which a restart goes on.
        seed (`int`, *optional*, defaults to `0`): of sampling, mixing and seed examples.
        concurrency (`int`, *optional*, defaults to `16`): requests under way at an endpoint.
        timeout (`float`, *optional*, defaults to `600.0`): seconds without a byte after which a request has failed.
        retries (`int`, *optional*, defaults to `5`): further attempts after a failed one.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): environment variable with the endpoints' key.
        request_options (`dict` or `str`, *optional*): JSON merged into each request to a teacher's endpoint; null
            takes a key out. Write a secret as `"$NAME"`: it is read from that environment variable.

    > Parameters that control new prompts

    Args:
        new_prompts (`int`, *optional*, defaults to `0`): prompts that the first teacher writes after examples from the
            dataset, and that are completed like those.
        new_prompts_seeds (`int`, *optional*, defaults to `4`): examples shown to it at a time.

    > Parameters that control verification; at most one kind

    Args:
        reward_funcs (`list[str]`, *optional*): import paths of reward functions; a single one need not be a list. The
            score is their mean.
        reward_model (`str`, *optional*): name or folder of a sequence-classification model with one label.
        judge (`str`, *optional*): a model that judges completions; see [`JudgeSettings`].

    > Parameters that control what is kept

    Args:
        keep (`str`, *optional*, defaults to `"all"`): `"all"`, `"correct"` (score of `correct_from` or more) or
            `"best"` (the highest score of each prompt, among those that pass the filters; of equals the first).
        correct_from (`float`, *optional*, defaults to `1.0`): score from which a completion is correct.
        pairs (`bool`, *optional*, defaults to `False`): write pairs: each prompt's best completion and its worst.
        min_characters (`int`, *optional*, defaults to `1`): shorter completions are dropped.
        max_characters (`int`, *optional*): longer completions are dropped.
        keep_truncated (`bool`, *optional*, defaults to `False`): keep completions that ran into the length limit.
        max_repetition (`float`, *optional*, defaults to `0.3`): largest share of repeated word 4-grams; 1 keeps all.
        near_duplicates (`float`, *optional*, defaults to `0.8`): Jaccard similarity of word 3-grams from which two
            rows are near duplicates; 0 switches it off. Prompts that name different numbers never are.

    > Parameters that control human data

    Args:
        human_data (`str`, *optional*): file, folder or name with "prompt" and "completion", or "messages".
        human_share (`float`, *optional*, defaults to `0.0`): share of human rows in the result, below 1.
    """

    dataset_name: str = field(default="", metadata={"help": "Prompts: a .jsonl file, a folder or a hub name."})
    output_dir: str = field(
        default="", metadata={"help": "Folder of the finished dataset; <output_dir>.work holds what is on the way."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    max_prompts: int | None = field(default=None, metadata={"help": "Read no further than this many prompts."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a dataset that this pipeline left in `output_dir`."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder or hub name, `vllm:name`, or `http://...#model`."}
    )
    teacher_models: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Several teachers by name, as JSON."}
    )
    teacher_assignment: str = field(
        default="all", metadata={"help": "Who completes a prompt: `all`, `rotate` or `column`."}
    )
    completions_per_prompt: int = field(default=1, metadata={"help": "Completions of each teacher for a prompt."})
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus."})
    batch_size: int = field(default=16, metadata={"help": "Prompts in one forward; transformers only."})
    chunk_size: int = field(default=64, metadata={"help": "Prompts between two points at which a restart goes on."})
    seed: int = field(default=0, metadata={"help": "Of sampling, mixing and seed examples."})
    concurrency: int = field(default=16, metadata={"help": "Requests under way at an endpoint."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds without a byte after which a request has failed."})
    retries: int = field(default=5, metadata={"help": "Further attempts after a failed one."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the endpoints' key."}
    )
    request_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON merged into each request to a teacher."}
    )
    new_prompts: int = field(
        default=0, metadata={"help": "Prompts that the first teacher writes after examples from the dataset."}
    )
    new_prompts_seeds: int = field(default=4, metadata={"help": "Examples shown to it at a time."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Verifiers: import paths, or names from trl.rewards."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Verifier: a sequence-classification model with one label."}
    )
    keep: str = field(default="all", metadata={"help": "`all`, `correct` or `best`."})
    correct_from: float = field(default=1.0, metadata={"help": "Score from which a completion is correct."})
    pairs: bool = field(
        default=False, metadata={"help": "Write preference pairs: each prompt's best completion and its worst."}
    )
    min_characters: int = field(default=1, metadata={"help": "Shorter completions are dropped."})
    max_characters: int | None = field(default=None, metadata={"help": "Longer completions are dropped."})
    keep_truncated: bool = field(default=False, metadata={"help": "Keep completions that ran into the length limit."})
    max_repetition: float = field(
        default=0.3, metadata={"help": "Largest share of repeated word 4-grams; 1 keeps all."}
    )
    near_duplicates: float = field(
        default=0.8, metadata={"help": "Similarity from which rows are near duplicates; 0 switches it off."}
    )
    human_data: str | None = field(
        default=None, metadata={"help": "Human rows: `prompt` and `completion`, or `messages`."}
    )
    human_share: float = field(default=0.0, metadata={"help": "Share of human rows in the result, below 1."})

    def __post_init__(self) -> None:
        for name in ("teacher_models", "request_options", "engine_options", "chat_template_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, _json(name, value))
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        self.read_filter_lists()
        for fault in self._faults():
            raise ValueError(fault)

    def __repr__(self) -> str:
        return f"GenerateConfig({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"

    def shown(self) -> dict[str, Any]:
        """All settings without secrets, such as logins in URLs and keys in `request_options`."""
        return redacted(asdict(self))

    def _faults(self):
        """What is wrong, the first first."""
        if not self.dataset_name:
            yield "There are no prompts. Name a dataset with `--dataset_name`: a `.jsonl` file, a folder or a hub name."
        if not self.output_dir:
            yield "There is no place for the result. Name a folder with `--output_dir`."
        if (self.teacher_model_name_or_path is None) == (not self.teacher_models):
            yield (
                "Name the teacher with `--teacher_model_name_or_path`, or several with `--teacher_models` as JSON "
                '(`{"name": "folder"}`); one of the two, not both.'
            )
        for name, choices in (("keep", KEEP), ("teacher_assignment", ASSIGN)):
            if getattr(self, name) not in choices:
                yield f"`{name}={getattr(self, name)!r}` is not known. Choose one of {', '.join(map(repr, choices))}."
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                yield f"`{name}` is {value}; it must be {'at least' if high == _MANY else 'between'} {low}" + (
                    "." if high == _MANY else f" and {high}."
                )
        yield from self._endpoint_faults()
        yield from self.engine_faults()
        if self.temperature == 0 and self.completions_per_prompt > 1:
            yield (
                f"`completions_per_prompt={self.completions_per_prompt}` at `temperature=0` would be the same "
                "text each time. Raise the temperature, or ask for one completion."
            )
        yield from self._verification_faults()
        yield from self._human_faults()
        yield from self.evolve_faults()
        yield from self.revise_faults()
        yield from self.filter_faults()

    def _endpoint_faults(self):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):  # not shown: it may be the key
            yield (
                "`api_key_env` names an environment variable, but what is written there cannot be a name. Put the key "
                "into a variable, and write the variable's name."
            )
        teachers = self.teachers.values()  # raises an error for an address that cannot be used
        if self.chat_template_kwargs and all(one.kind == "endpoint" for one in (*teachers, *self.rewriters)):
            yield (
                "`chat_template_kwargs` are for models in this process, but all teachers are endpoints. Write them "
                'into `request_options`, as in `\'{"chat_template_kwargs": {"enable_thinking": false}}\'` for vLLM.'
            )
        if not _is_json(self.request_options):
            yield "`request_options` holds a number that JSON does not have, such as NaN. Write a number, or null."

    def _verification_faults(self):
        kinds = [name for name in ("reward_funcs", "reward_model", "judge") if getattr(self, name)]
        if len(kinds) > 1 and not (kinds == ["reward_funcs", "judge"] and self.judge_check):
            yield f"Both `{kinds[0]}` and `{kinds[1]}` say who verifies. Keep one." + (
                " Functions that only check the judge need labelled rows, `--judge_check`." if "judge" in kinds else ""
            )
        if not kinds and (self.keep != "all" or (self.pairs and not self.revise)):
            asked = "pairs" if self.pairs and self.keep == "all" else f"keep={self.keep!r}"
            yield f"`{asked}` needs scores. Add `--reward_funcs`, `--reward_model` or `--judge`."
        if self.revise and self.pairs and self.judge_mode == "pairwise":
            yield (
                "`judge_mode=pairwise` compares the answers to one prompt, and not a revision with its draft. For "
                "pairs of drafts and revisions, use another `judge_mode`, or leave the judge out."
            )
        yield from self.judge_faults()
        if self.pairs and self.keep == "best":
            yield "`pairs` takes the best and the worst of each prompt by itself. Leave `keep` out, or use `correct`."
        drafts = bool(self.revise)  # of which each makes a pair with its revision
        if self.pairs and not drafts and self.completions_per_prompt * (len(self.teachers) if self.asks_all else 1) < 2:
            yield "`pairs` needs two completions of a prompt or more. Set `--num_generations 4`, say."

    def _human_faults(self):
        if (self.human_data is None) != (self.human_share == 0):
            yield "`human_data` and `human_share` belong together: rows, and their share in the result, such as 0.2."
        if self.human_share == 1:
            yield "`human_share=1` leaves no room for the teachers' rows. Choose a share below 1."
        if self.pairs and self.human_data:
            yield "`human_data` has no rejected completions and cannot be mixed with `pairs`. Leave one of them out."

    @property
    def asks_all(self) -> bool:
        """Whether every teacher completes every prompt."""
        return self.teacher_assignment == "all"

    @property
    def teachers(self) -> dict[str, Address]:
        """Where each teacher is, by the name that its rows carry."""
        if self.teacher_models:
            assert isinstance(self.teacher_models, dict)
            return {
                name: parse_address(where if isinstance(where, list) else str(where))
                for name, where in self.teacher_models.items()
            }
        address = parse_address(self.teacher_model_name_or_path or "")
        return {address.short_name: address}

    @property
    def rewriters(self) -> list[Address]:
        """The models that rewrite prompts or completions and are named for that alone."""
        return [one for one in (self.evolve_address, self.revise_address) if one is not None]

    @property
    def verifies(self) -> bool:
        return bool(self.reward_funcs or self.reward_model or self.judge)


_MANY = 10**12


_RANGES: dict[str, tuple[float, float]] = {
    "max_prompts": (1, _MANY),
    "completions_per_prompt": (1, _MANY),
    "max_completion_length": (1, _MANY),
    "temperature": (0, _MANY),
    "top_p": (1e-6, 1),
    "batch_size": (1, _MANY),
    "chunk_size": (1, _MANY),
    "seed": (0, _MANY),
    "concurrency": (1, _MANY),
    "timeout": (1e-3, _MANY),
    "retries": (0, _MANY),
    "new_prompts": (0, _MANY),
    "new_prompts_seeds": (1, _MANY),
    "min_characters": (0, _MANY),
    "max_characters": (1, _MANY),
    "max_repetition": (0, 1),
    "near_duplicates": (0, 1),
    "human_share": (0, 1),
    "judge_comparisons": (1, _MANY),
    "correct_from": (-_MANY, _MANY),
}


def _json(name: str, text: str) -> dict[str, Any]:
    """A setting's JSON object. Messages do not repeat the text, in which there may be a key."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` holds no JSON ({error}). Write an object in single quotes.") from None
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is a {type(value).__name__}; it must be a JSON object.")
    return value


def _is_json(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_json, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)

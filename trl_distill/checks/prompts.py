"""Checks of prompts as they are tokenised for training: length, a doubled BOS, a stop token at the end.

All rows are counted, up to a limit; what was looked at is part of the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.images import COLUMNS as IMAGES
from ..data.images import prompt_of, shows_images, tidy_row
from ..images import EncodedPrompt
from .findings import Finding


MOST_ROWS = 100_000  # of a dataset that are tokenised; some 5,000 to 50,000 a second


MOST_IMAGES = 200  # rows that are counted where there are images, which take some milliseconds each


BATCH = 1_000  # prompts tokenised at once


PATIENCE = 3.0  # seconds before a progress bar appears


@dataclass
class Prompts:
    """
    What was found in one column of a dataset.

    Attributes:
        name (`str`): of the dataset, for messages.
        column (`str`): "prompt" or "teacher_prompt".
        rows (`int`): of the dataset.
        counted (`int`): rows that were tokenised, from the first on.
        longest (`int`): tokens of the longest prompt.
        longest_row (`int`): its row.
        doubled (`list[int]`): rows that begin with BOS twice.
        ended (`list[int]`): rows that end with a stop token.
        examples (`dict[int, list[int]]`): ids of the first of these rows.
    """

    name: str
    column: str
    rows: int
    counted: int
    longest: int = 0
    longest_row: int = 0
    doubled: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    examples: dict[int, list[int]] = field(default_factory=dict)

    def add(self, row: int, ids: list[int], bos: int | None, stops: Iterable[int]) -> None:
        """Look at one prompt."""
        if len(ids) > self.longest:
            self.longest, self.longest_row = len(ids), row
        for found, holds in (
            (self.doubled, len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos),
            (self.ended, len(ids) > 1 and ids[-1] in stops),
        ):
            if holds:
                if not found:
                    self.examples[row] = ids
                found.append(row)

    def __str__(self) -> str:
        if self.counted == self.rows:
            return f"all {self.rows} of {self.name}"
        return f"the first {self.counted} of {self.rows} of {self.name}; a longer one may follow"


def count(
    dataset: Any,
    name: str,
    column: str,
    encode: Callable[[list[Any], list[Any]], list[EncodedPrompt]],
    bos: int | None,
    stops: Iterable[int],
    quiet: bool = True,
) -> Prompts | None:
    """
    Tokenise the prompts of a dataset, in batches.

    Args:
        dataset: a `Dataset`; of anything else nothing can be read without consuming it.
        name (`str`): its name, for messages.
        column (`str`): "prompt" or "teacher_prompt". Empty prompts are passed over.
        encode (`Callable`): turns prompts, with their rows' tools, into what the student reads, as in training.
        bos (`int`, *optional*): id of the BOS token.
        stops (`Iterable[int]`): ids that end a turn.
        quiet (`bool`): whether to show no progress bar; there is one if it takes longer than a few seconds.

    Returns:
        [`Prompts`], *optional*: `None` if the column cannot be read.
    """
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return None
    images = shows_images(dataset)
    limit, size = min(len(dataset), MOST_IMAGES if images else MOST_ROWS), 1 if images else BATCH
    shown = name if column == "prompt" else f"`{column}` in {name}"
    columns = [name for name in (column, "tools", *(IMAGES if images else ())) if name in dataset.column_names]
    found, dataset = Prompts(shown, column, len(dataset), limit), dataset.select_columns(columns)
    with tqdm(total=limit, desc=f"Counting tokens of {name}", delay=PATIENCE, disable=quiet, leave=False) as bar:
        for start in range(0, limit, size):
            read = dataset[start : min(start + size, limit)]
            tools = read.get("tools") or [None] * len(read[column])
            prompts = read[column]
            if images:
                each = [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]
                prompts = [prompt_of(tidy_row(row), column) for row in each]
            rows = [(start + i, *row) for i, row in enumerate(zip(prompts, tools, strict=True)) if row[0]]
            encoded = encode([prompt for _, prompt, _ in rows], [own for *_, own in rows]) if rows else []
            for (row, *_), prompt in zip(rows, encoded, strict=True):
                found.add(row, prompt.ids, bos, stops)
            bar.update(len(prompts))
    return found


def special_tokens(found: list[Prompts], tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Whether prompts begin with BOS twice, or end with a stop token; both when template and tokenizer add one."""
    said, advice = [], []
    for prompts in found:
        if prompts.doubled:
            ids = prompts.examples[prompts.doubled[0]]
            said.append(
                f"{len(prompts.doubled)} of {prompts.counted} prompts of {prompts.name} begin with BOS twice "
                f"(row {prompts.doubled[0]}: {_shown(tokenizer, ids[:4])} ...), which models are not trained on."
            )
            advice.append("Leave BOS out of the text or the chat template, or set `tokenizer.add_bos_token = False`.")
        if prompts.ended:
            ids = prompts.examples[prompts.ended[0]]
            said.append(
                f"{len(prompts.ended)} of {prompts.counted} prompts of {prompts.name} end with a stop token "
                f"(row {prompts.ended[0]}: ... {_shown(tokenizer, ids[-4:])}), so the turn is over before the "
                "completion begins."
            )
            advice.append(
                "Set `tokenizer.add_eos_token = False`, drop it from the text, or end the chat template with a "
                "generation prompt."
            )
    if said:
        return Finding("prompt ids", "warning", " ".join(said), " ".join(dict.fromkeys(advice)))
    return Finding("prompt ids", "ok", "No prompt begins with BOS twice or ends with a stop token.")


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)

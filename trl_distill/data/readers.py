"""How a model reads the prompts of rows outside of training: token ids, and pixels where there are images.

In training, the trainer renders prompts; a [`PromptReader`] can be made of its functions, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..images import EncodedPrompt
from .images import encode, prompt_of
from .sampling import prompt_ids


Encode = Callable[..., EncodedPrompt]  # of a prompt and of its row's `tools=`


def encoder_of(
    tokenizer: Any,
    processor: Any = None,
    template_kwargs: dict[str, Any] | None = None,
    chat_template: str | None = None,
) -> Encode:
    """
    What turns a prompt into what a model reads.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's; for text models.
        processor (`ProcessorMixin`, *optional*): that of a vision-language model.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
        chat_template (`str`, *optional*): in place of the processor's.
    """
    if processor is None:
        return functools.partial(_encoded_text, tokenizer, template_kwargs)
    return functools.partial(_encoded, processor, template_kwargs, chat_template)


def _encoded_text(tokenizer: Any, template_kwargs: dict[str, Any] | None, prompt: Any, tools: Any = None) -> Any:
    return EncodedPrompt(prompt_ids(tokenizer, prompt, template_kwargs, tools))


def _encoded(
    processor: Any, template_kwargs: dict[str, Any] | None, template: str | None, prompt: Any, tools: Any = None
) -> Any:
    (found,) = encode(processor, [prompt], template_kwargs, [tools], template)
    return found


@dataclass(frozen=True)
class PromptReader:
    """
    How student and teacher read the prompts of rows.

    Attributes:
        student (`Callable`): turns a prompt and its row's `tools=` into an [`~trl_distill.images.EncodedPrompt`].
        teacher (`Callable`, *optional*): the same for a teacher with another processor.
    """

    student: Encode
    teacher: Encode | None = None

    def prompt(self, row: dict[str, Any]) -> EncodedPrompt:
        """The row's prompt as the student reads it."""
        return self.student(prompt_of(row), tools=row.get("tools"))

    def teacher_prompt(self, row: dict[str, Any], prompt: EncodedPrompt) -> EncodedPrompt:
        """What the teacher reads: the row's "teacher_prompt" if it has one, else its prompt, given for the student."""
        own = prompt_of(row, "teacher_prompt")
        if self.teacher is not None:
            return self.teacher(own or prompt_of(row), tools=row.get("tools"))
        return self.student(own, tools=row.get("tools")) if own else prompt


def continued(prompt: EncodedPrompt, ids: Sequence[int]) -> EncodedPrompt:
    """A prompt with further token ids of text."""
    zeros = torch.zeros(len(ids), dtype=torch.long)
    kinds = {name: torch.cat([kind, zeros]) for name, kind in prompt.kinds.items()}
    return replace(prompt, ids=[*prompt.ids, *ids], kinds=kinds)

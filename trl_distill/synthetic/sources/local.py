"""Who completes prompts: a model of transformers, or vLLM in this process.

A source is anything with `complete(prompts, seed)`. The same prompts in the same order with the same seed give the
same completions, which is what lets a killed run be resumed. HTTP endpoints are in `endpoint.py`; which prompts to ask
for is left to the pipeline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..._trl import create_model_from_path
from ...data import sampling
from ...data.readers import encoder_of
from ...images import EncodedPrompt
from ...models.loading import load_processor
from ...models.properties import placeholder_ids, reads_images
from ..records import Answer, Completion, Refusal
from ..text import Text
from .base import Sampling, Seeds, seeds_of


class TransformersSource:
    """
    A model in this process, on the GPU if there is one, in the checkpoint's dtype; also a vision-language model, whose
    processor reads the prompts.

    Args:
        model (`str`): name or folder. Stop tokens are those of its generation configuration and its tokenizer.
        sampling (`Sampling`): how to sample. The generation configuration's own settings are not used.
        batch_size (`int`): prompts in one forward.
        template_kwargs (`dict`, *optional*): for the chat template, such as `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        batch_size: int = 16,
        template_kwargs: dict[str, Any] | None = None,
    ):
        self.sampling, self.batch_size = sampling, batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
        if reads_images(config):
            loaded: Any = create_model_from_path(model, dtype="auto", device_map=None)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self.encode = encoder_of(self.tokenizer, load_processor(model, config), template_kwargs)
        self.model = loaded.to(self.device).eval()
        found = self.model.generation_config.eos_token_id
        known = found if isinstance(found, list) else [found]
        self.stops = sorted({stop for stop in [*known, self.tokenizer.eos_token_id] if stop is not None})
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def complete(self, prompts: list[Text], seed: Seeds) -> list[Answer]:
        seeds = seeds_of(seed, len(prompts))
        encoded = [self.encode(prompt) for prompt in prompts]
        answers: list[Answer] = [self._refusal(len(prompt.ids)) or [] for prompt in encoded]
        possible = [i for i, answer in enumerate(answers) if not isinstance(answer, Refusal)]
        for start in range(0, len(possible), self.batch_size):
            chosen = possible[start : start + self.batch_size]
            found = self._write([encoded[i] for i in chosen], seeds[start])
            for i, completions in zip(chosen, found, strict=True):
                answers[i] = completions
        return answers

    def close(self) -> None:
        del self.model
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _refusal(self, length: int) -> Refusal | None:
        limit = self.sampling.max_tokens
        if length == 0:
            return Refusal("prompt without tokens", "the tokenizer makes no token of it")
        if self.longest is not None and length + limit > self.longest:
            detail = f"{length} tokens of prompt and up to {limit} of completion exceed {self.longest} positions"
            return Refusal("prompt too long for the teacher", detail)
        return None

    def _write(self, batch: list[EncodedPrompt], seed: int) -> list[list[Completion]]:
        """The completions of one batch of prompts."""
        s = self.sampling
        how = sampling.Sampling(
            s.max_tokens,
            tuple(self.stops),
            s.temperature,
            generations=s.n,
            seed=seed,
            suppressed=tuple(sorted(placeholder_ids(self.model.config))),
            top_p=s.top_p,
        )
        found = sampling.sample_ids(self.model, batch, self.tokenizer.pad_token_id, how)
        return [[self._read(*one) for one in of_prompt] for of_prompt in found]

    def _read(self, ids: list[int], truncated: bool) -> Completion:
        """The text before the stop token. Other special tokens are part of it, such as those of thoughts and tools."""
        (text,) = sampling.answer_texts(self.tokenizer, [ids if truncated else ids[:-1]], self.stops)
        return Completion(text, "length" if truncated else "stop")


class VLLMSource:
    """
    vLLM in this process, in the dtype that it chooses: on a CPU, bfloat16 for checkpoints in fp32.

    Args:
        model (`str`): name or folder.
        sampling (`Sampling`): how to sample. Each prompt has a seed of its own, whatever batch it is in.
        template_kwargs (`dict`, *optional*): for the chat template.
    """

    def __init__(self, model: str, sampling: Sampling, template_kwargs: dict[str, Any] | None = None):
        from vllm import LLM, SamplingParams

        self.sampling, self._params, self._refusals = sampling, SamplingParams, _refusals()
        self._template = {"chat_template_kwargs": template_kwargs} if template_kwargs else {}
        self._llm = LLM(model=model)

    def complete(self, prompts: list[Text], seed: Seeds) -> list[Answer]:
        s, seeds = self.sampling, seeds_of(seed, len(prompts))
        how = {"n": s.n, "max_tokens": s.max_tokens, "temperature": s.temperature, "top_p": s.top_p}
        # the stop token is left out all the same; thoughts and tool calls stay
        params = [self._params(**how, seed=one, skip_special_tokens=False) for one in seeds]
        # `generate` for text, `chat` for messages, which applies the template
        ask = self._llm.generate if isinstance(prompts[0], str) else partial(self._llm.chat, **self._template)
        try:
            outputs = ask(prompts, params, use_tqdm=False)
        except self._refusals as error:
            if len(prompts) == 1:
                return [Refusal("refused by vLLM", str(error))]
            # one prompt may be too long; alone each shows whether it is the one
            return [self.complete([prompt], [one])[0] for prompt, one in zip(prompts, seeds, strict=True)]
        return [[Completion(o.text, o.finish_reason or "length") for o in output.outputs] for output in outputs]

    def close(self) -> None:
        del self._llm


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a prompt that it does not accept; `ValueError` before it had exceptions of its own."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:
        return (ValueError,)
    return (ValueError, VLLMClientError)

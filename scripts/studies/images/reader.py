"""What a model says of pictures: prompts with images as it reads them, answers, and how good they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from scripts.studies.demo.student import Measured
from scripts.studies.images.drawings import MAX_COMPLETION_LENGTH, correct
from trl_distill.objective.divergences import reverse_kl


MODELS = Path(__file__).parent / "models"
AT_ONCE = 125  # pictures


@dataclass(frozen=True)
class Models:
    """Student, teacher and their processor."""

    student: Any
    teacher: Any
    processor: Any


def load(folder: Path) -> Models:
    """The models in `folder`, in fp32; their weights are stored in bfloat16."""
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(folder / name, dtype="float32") for name in ("student", "teacher")
    )
    return Models(student, teacher, AutoProcessor.from_pretrained(folder / "student"))


def encode(processor: Any, rows: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """Prompts with their pictures, padded on the left: `input_ids` and `attention_mask` `(B, P)`, and pixels."""
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": p[0]["content"]}]}]
        for p, image in zip(rows["prompt"], rows["image"], strict=True)
    ]
    return dict(
        processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
    )


def _sampled(model: Any, processor: Any, rows: Dataset) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Prompts, a batch at a time, and completions `(B, C)` at temperature 1, padded after the end."""
    for start in range(0, len(rows), AT_ONCE):
        inputs = encode(processor, rows[start : start + AT_ONCE])
        ids = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_COMPLETION_LENGTH,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=[model.config.image_token_id],
        )
        yield inputs, ids[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def answers(model: Any, processor: Any, rows: Dataset, seed: int) -> list[str]:
    """One answer for each row, sampled at temperature 1."""
    model.eval()
    set_seed(seed)
    decode = processor.tokenizer.batch_decode
    return [text for _, ids in _sampled(model, processor, rows) for text in decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def measure(models: Models, model: Any, rows: Dataset, seed: int) -> Measured:
    """Accuracy and KL(model ‖ teacher), nats per token: one sampled answer to each problem."""
    was_training, state = model.training, torch.random.get_rng_state()
    model.eval()
    set_seed(seed)
    tokenizer, texts, kl, tokens = models.processor.tokenizer, [], 0.0, 0
    for inputs, ids in _sampled(model, models.processor, rows):
        mask = ids != tokenizer.pad_token_id
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        logits = [m(**inputs).logits[:, -ids.shape[1] - 1 : -1] for m in (model, models.teacher)]
        kl += (reverse_kl(*logits) * mask).sum().item()
        tokens += int(mask.sum())
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    torch.random.set_rng_state(state)
    model.train(was_training)
    return Measured(sum(correct(texts, rows["answer"])) / len(rows), kl / tokens, tokens / len(rows))

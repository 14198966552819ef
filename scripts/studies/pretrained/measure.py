"""What is measured of a student beside its teacher, on prompts that training does not see.

In plain PyTorch on full logits, so that nothing here rests on the library's own losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scripts.studies.pretrained.prompts import right
from trl_distill import Rollouts
from trl_distill.data.sampling import Sampling, answer_texts, prompt_ids, rollouts_of, sample_completions


LIMIT = 48  # tokens of an answer, in training and here


BATCH, TOGETHER = 16, 64  # answers in a training step and in a comparison, and answers written together


Written = list[tuple[list[int], list[int]]]  # ids of prompts and completions


def write(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], seed: int, temperature: float = 1.0) -> Written:
    """One answer of a model to each row's prompt."""
    made: Written = []
    stops = (tokenizer.eos_token_id,)
    for start in range(0, len(rows), TOGETHER):
        part = list(rows[start : start + TOGETHER])
        how = Sampling(LIMIT, stops, temperature, seed=seed + start)
        prompts = [prompt_ids(tokenizer, row["prompt"]) for row in part]
        found = sample_completions(model, part, prompts, tokenizer.pad_token_id, how)
        made += [(one.prompt, one.completion) for one in found]
    return made


@torch.no_grad()
def compare(student: Any, teacher: Any, written: Written) -> dict[str, float]:
    """
    Both models on the same answers.

    Returns:
        `dict[str, float]`: means over tokens: "reverse_kl" and "forward_kl" in nats, "agreement" (the share of tokens
        where both find the same one most likely), "teacher_nll" and "student_nll" of the answers.
    """
    sums, tokens = torch.zeros(5, dtype=torch.float64), 0
    for start in range(0, len(written), BATCH):
        rollouts = batch_of(written[start : start + BATCH], student.device)
        ours, theirs = log_probs(student, rollouts), log_probs(teacher, rollouts)  # (N, V)
        chosen = rollouts.input_ids[:, -rollouts.mask.shape[1] :][rollouts.mask].unsqueeze(1)
        found = torch.stack(
            [
                (ours.exp() * (ours - theirs)).sum(),
                (theirs.exp() * (theirs - ours)).sum(),
                (ours.argmax(1) == theirs.argmax(1)).sum().float(),
                -theirs.gather(1, chosen).sum(),
                -ours.gather(1, chosen).sum(),
            ]
        )
        sums += found.double().cpu()
        tokens += len(chosen)
    names = ("reverse_kl", "forward_kl", "agreement", "teacher_nll", "student_nll")
    return dict(zip(names, (sums / tokens).tolist(), strict=True))


def batch_of(written: Written, device: torch.device) -> Rollouts:
    """Answers as one batch."""
    prompts, completions = zip(*written, strict=True)
    return rollouts_of(prompts, completions, 0, device)


@torch.no_grad()
def log_probs(model: Any, rollouts: Rollouts) -> torch.Tensor:
    """Of all ids, at the judged tokens: `(N, V)`."""
    places = (rollouts.attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.model(
        rollouts.input_ids, attention_mask=rollouts.attention_mask, position_ids=places, use_cache=False
    ).last_hidden_state
    judged = hidden[:, -rollouts.mask.shape[1] - 1 : -1][rollouts.mask]
    return model.lm_head(judged).float().log_softmax(-1)


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of right greedy answers, by kind of question."""
    written = write(model, tokenizer, rows, 0, temperature=0)
    texts = answer_texts(tokenizer, [completion for _, completion in written], (tokenizer.eos_token_id,))
    found: dict[str, list[float]] = {}
    for row, text in zip(rows, texts, strict=True):
        found.setdefault(row["kind"], []).append(right(text, row["kind"], row["word"]))
    return {kind: sum(values) / len(values) for kind, values in found.items()}

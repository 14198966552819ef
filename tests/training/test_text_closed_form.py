"""Training with another tokenizer ends where the objective says: the teacher over texts times e^{reward / beta}.

In canonical tokens, and only with the charge for leaving them: without it every spelling of a text gets its mass.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from helpers import config, make_model
from text_models import MERGES, STUDENT, TEACHER, TEACHER_STOPS, make_bpe

from trl_distill import OPDTrainer
from trl_distill.alignment.completions import align


LENGTH, PAD, EOS = 6, 0, 1
PROMPT, BETA = "bba", 0.5  # with "ab" alone a student of one layer could not tell it from "ab" written once more
COMPLETIONS = [
    (*ids, EOS)
    for length in range(LENGTH)
    for ids in itertools.product([i for i in range(len(STUDENT)) if i != EOS], repeat=length)
]  # those that stop; others are cut, and rare


def make_pair(folder):
    """Both end soon, so that few completions are cut; the teacher rarely writes the token for padding."""
    student, teacher = (
        make_model("bias", seed=seed, vocab_size=len(tokens), num_hidden_layers=1, initializer_range=0.15)
        for seed, tokens in ((1, STUDENT), (2, TEACHER))
    )
    with torch.no_grad():
        student.lm_head.bias[EOS] += 1.0
        teacher.lm_head.bias.copy_(torch.tensor([-3.0, 2.4, 1.4, 0.9, 1.4, -1.5, -1.5]))
    for model in (student, teacher):
        model.get_input_embeddings().padding_idx = None  # an ordinary token here
    teacher.generation_config.eos_token_id = TEACHER_STOPS
    own, other = make_bpe(STUDENT, MERGES["student"], "<eos>"), make_bpe(TEACHER, MERGES["teacher"], "<end>")
    other.save_pretrained(folder)
    teacher.config._name_or_path = str(folder)
    return student, own, teacher, other


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(STUDENT[i] for i in ids if i not in (PAD, EOS))


def reward(ids: tuple[int, ...]) -> float:
    """Of the text alone: for texts that have a second spelling."""
    return 1.0 if text_of(ids).startswith("ab") else 0.0


@torch.no_grad()
def log_probs(model, prompt: list[int], rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Of each sequence behind the prompt, nats."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*prompt, *row, *[0] * (longest - len(row))] for row in rows])
    found = torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in ids.split(512)])
    found = found[:, len(prompt) - 1 : -1].gather(2, ids[:, len(prompt) :, None])[:, :, 0]
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return (found.double() * mask).sum(1)


def closed_forms(pair, teacher, other) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimum with and without the charge, over `COMPLETIONS`."""
    aligned = [align(pair, list(y[:-1]), True) for y in COMPLETIONS]
    prompt = other(PROMPT).input_ids
    texts = [tuple(one.paths[0]) for one in aligned]
    stops = torch.stack([log_probs(teacher, prompt, [(*text, end) for text in texts]) for end in TEACHER_STOPS])
    p = stops.logsumexp(0).exp()
    canonical = torch.tensor([not any(one.charged) for one in aligned])
    assert 0 < canonical.sum() < len(canonical)
    tilted = p * (torch.tensor([reward(y) for y in COMPLETIONS], dtype=torch.float64) / BETA).exp()
    return tuple(weights / weights.sum() for weights in (tilted * canonical, tilted))


@pytest.mark.slow
@pytest.mark.parametrize("charged", [True, False], ids=["charged", "not_charged"])
def test_training_ends_at_the_teacher_over_texts_and_not_without_the_charge(tmp_path, charged):
    student, own, teacher, other = make_pair(tmp_path / "teacher")

    def reward_func(completion_ids, **_):
        return [reward(tuple(ids)) for ids in completion_ids]

    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        reward_funcs=reward_func,
        args=config(
            tmp_path,
            cross_tokenizer=True,
            beta=BETA,
            kl_discount=1.0,
            max_steps=400,
            num_generations=8,
            per_device_train_batch_size=256,
            max_completion_length=LENGTH,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            top_k=0,
            loss_type="dr_grpo",
            logging_steps=100,
        ),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 64}),
        processing_class=own,
    )
    assert trainer.estimator.charge == 10.0
    trainer.estimator.charge *= charged
    target, uncharged = closed_forms(trainer.teacher.pair, teacher, other)
    assert 0.5 * (target - uncharged).abs().sum() > 0.1

    def distance() -> float:
        """Total variation to the target, in which nothing is cut."""
        student.eval()
        q = log_probs(student, own(PROMPT).input_ids, COMPLETIONS).exp()
        return 0.5 * ((q - target).abs().sum() + 1 - q.sum()).item()

    before = distance()
    trainer.train()
    after = distance()
    print(f"total variation: {before:.3f} before, {after:.3f} after")
    assert before > 0.3
    assert after < 0.03 if charged else after > 0.1

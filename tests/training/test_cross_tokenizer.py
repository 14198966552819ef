"""A teacher with another tokenizer: the exact estimator where both have the same, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from datasets import Dataset
from helpers import config, gradients, in_training, relative_error
from text_models import MERGES, STUDENT, TEACHER, make_bpe, make_pair

from trl_distill import OPDTrainer
from trl_distill.alignment.completions import align
from trl_distill.alignment.spellings import spellings
from trl_distill.alignment.text_tokenizer import TextTokenizer
from trl_distill.alignment.vocabularies import vocabularies
from trl_distill.checks.findings import PreflightError


PROMPT = "ab"


def trainer_of(folder, made, **changes) -> OPDTrainer:
    student, own, teacher, _ = made
    settings = {"loss_type": "dr_grpo", "top_k": 0, "max_completion_length": 4, **changes}
    return OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(folder, **settings),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 64}),
        processing_class=own,
    )


def batch_of(prompt: list[int]) -> dict[str, torch.Tensor]:
    """Completions in the student's canonical tokens: stopped, cut, and with a token of its own for padding in it."""
    rows = [[4, 3, 1, 0], [2, 2, 4, 3], [0, 3, 3, 1], [1, 0, 0, 0]]
    lengths = torch.tensor([3, 4, 4, 1])
    mask = (torch.arange(4) < lengths[:, None]).long()
    prompts = torch.tensor([prompt] * len(rows))
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "text_prompt_0_ids": prompts,
        "text_prompt_0_mask": torch.ones_like(prompts),
        "completion_ids": torch.tensor(rows),
        "completion_mask": mask,
        "advantages": torch.tensor([0.5, -1.0, 0.0, 2.0]),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_same_tokenizer_as_another_gives_the_exact_estimator(tmp_path, discount, monkeypatch):
    found = []
    monkeypatch.setattr("trl_distill.checks.cross_tokenizer.has_another", lambda *_: True)
    for cross in (False, True):
        made = make_pair(tmp_path / "teacher", teacher_tokens="student")
        trainer = in_training(trainer_of(tmp_path, made, kl_discount=discount, cross_tokenizer=cross))
        loss = trainer.rollout_loss(trainer.model, batch_of(made[1](PROMPT).input_ids))
        loss.backward()
        found.append(torch.cat([gradients(trainer.model), loss.detach().double()[None]]))
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "parked"])
def test_it_trains_and_logs_what_left_the_path(tmp_path, offload):
    trainer = trainer_of(tmp_path, make_pair(tmp_path / "teacher"), cross_tokenizer=True, teacher_offload=offload)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    for row in logs:
        assert math.isfinite(row["loss"])
        assert 0 <= row["distill/non_canonical"] <= 1
        assert 0 <= row["distill/exact_tokens"] <= 1


def test_without_being_asked_for_it_is_refused_and_the_message_says_how(tmp_path):
    with pytest.raises(PreflightError, match="cross_tokenizer=True"):
        trainer_of(tmp_path, make_pair(tmp_path / "teacher"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "sampled"},
        {"lmbda": 0.5},
        {"assume_same_tokenizer": True},
        {"teacher_ema": 0.9},
        {"token_weighting": "cap", "token_weighting_kwargs": {"nats": 0.3}},
        {"kl_temperature": 2.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_go_with_it_is_refused(tmp_path, changes):
    with pytest.raises(
        ValueError, match=f"(?s)cross_tokenizer=True.*{next(iter(changes))}|{next(iter(changes))}.*cross"
    ):
        config(tmp_path, cross_tokenizer=True, **changes)


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path):
    made = make_pair(tmp_path / "teacher")
    made[2].config._name_or_path = ""
    with pytest.raises(PreflightError, match="has no tokenizer with it"):
        trainer_of(tmp_path, made, cross_tokenizer=True)


def findings(trainer: OPDTrainer) -> dict[str, str]:
    return {finding.check: finding.found for finding in trainer.preflight.findings}


def test_the_preflight_shows_both_tokenizers_side_by_side(tmp_path):
    made = make_pair(tmp_path / "teacher")
    found = findings(trainer_of(tmp_path, made, cross_tokenizer=True))
    assert "5 ids of the student, 7 of the teacher, 3 shared by their bytes, 1 of them closed" in found["tokenizer"]
    assert found["stop tokens"].startswith(
        "The student ends with '<eos>' (1), the teacher with '<end>' (1), '<alt>' (2): any of the one counts as any"
    )
    spans = found["spans"]
    assert re.match(r"Of \d+ tokens of the teacher's first completions, \d+% are exact, in \d+ spans", spans), spans
    assert "The commonest other spans, student against teacher: " in spans
    shown = re.findall(r"'([^']*)' against '([^']*)' \((\d+)\)", spans)
    assert 0 < len(shown) <= 10
    counts = [int(count) for _, _, count in shown]
    assert counts == sorted(counts, reverse=True)
    for ours, theirs, _ in shown:
        assert ours.replace(" | ", "") == theirs.replace(" | ", "")


def test_spellings_hold_every_token_once():
    own, other = make_bpe(STUDENT, MERGES["student"], "<eos>"), make_bpe(TEACHER, MERGES["teacher"], "<end>")
    pair = vocabularies(TextTokenizer(own, "student"), TextTokenizer(other, "teacher"))
    ids = own("abbaab").input_ids
    found = spellings(pair, ids, align(pair, ids, True))
    assert [i for one in found for i in one.student] == ids
    assert [i for one in found for i in one.teacher] == other("abbaab").input_ids
    assert [one.stop for one in found] == [*(one.start for one in found[1:]), len(ids) + 1]
    assert not any(one.charged for one in found)
    (through_pad,) = spellings(pair, [0], align(pair, [0], False))
    assert through_pad.exact

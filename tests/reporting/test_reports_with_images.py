"""Evaluations and token reports of vision-language models: numbers beside full logits of each row read alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import make_model, make_tokenizer
from vision_models import picture, vision_pair
from vision_runs import config, judged_alone, make, rows

from trl_distill import OPDTrainer, TokenReport
from trl_distill.data.readers import PromptReader, encoder_of
from trl_distill.data.sampling import SampledCompletion, Sampling, dataset_completion, scorer_of
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.models.properties import placeholder_ids
from trl_distill.reporting.evaluation import answer_all
from trl_distill.reporting.tokens.collect import scored


FAMILIES = ["qwen2_5_vl", "idefics3", "gemma3", "llava"]


def made(family: str, resolution: int = 16):
    """Student, teacher, their processors, and how they read prompts."""
    student, processor = vision_pair(family, seed=0)
    teacher, theirs = vision_pair(family, seed=1, resolution=resolution)
    other = encoder_of(None, theirs) if resolution != 16 else None
    reader = PromptReader(encoder_of(None, processor), other)
    for model in (student, teacher):
        add_teacher_forward(model)
    return student, teacher, processor, theirs, reader


@torch.no_grad()
def kl_alone(student, teacher, processor, theirs, row, ids):
    log_q = judged_alone(student, processor, row, torch.tensor(ids))
    log_p = judged_alone(teacher, theirs, row, torch.tensor(ids))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize("resolution", [16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kl_of_an_evaluation_is_that_of_full_logits(family, resolution):
    student, teacher, processor, theirs, reader = made(family, resolution)
    dataset, tokenizer = list(rows()), processor.tokenizer
    suppressed = tuple(placeholder_ids(student.config))
    how = Sampling(limit=5, stops=(tokenizer.eos_token_id,), generations=2, seed=3, suppressed=suppressed)
    batches = answer_all(student, dataset, tokenizer, how, teacher=teacher, batch_size=6, reader=reader)
    found = list(itertools.chain(*batches))
    assert len(found) == 8
    for answer in found:
        expected = kl_alone(student, teacher, processor, theirs, dataset[answer.prompt], answer.ids).sum().item()
        assert answer.kl == pytest.approx(expected, rel=1e-3)
        blind = {**dataset[answer.prompt], "images": []}
        unseen = kl_alone(student, teacher, processor, theirs, blind, answer.ids).sum().item()
        assert (abs(unseen - expected) > 1e-3) == bool(dataset[answer.prompt]["images"])


def test_answers_that_begin_with_given_tokens():
    student, teacher, processor, theirs, reader = made("gemma3")
    dataset, how = list(rows()), Sampling(limit=3, stops=(processor.tokenizer.eos_token_id,))
    batches = answer_all(
        *(student, dataset, processor.tokenizer, how), teacher=teacher, prefixes=[[30, 31]] * 4, reader=reader
    )
    for answer in itertools.chain(*batches):
        assert answer.ids[:2] == (30, 31)
        expected = kl_alone(student, teacher, processor, theirs, dataset[answer.prompt], answer.ids).sum().item()
        assert answer.kl == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_of_a_report_has_the_kl_of_full_logits(family):
    student, teacher, processor, theirs, reader = made(family, resolution=32)
    tokenizer = processor.tokenizer
    how = Sampling(limit=20, stops=(tokenizer.eos_token_id,))
    written: list[SampledCompletion] = [dataset_completion(row, tokenizer, how, None, processor) for row in rows()]
    found = scored(written, [scorer_of(student)], scorer_of(teacher), tokenizer, "cpu", reader=reader)
    for completion, row in zip(found, rows(), strict=True):
        assert completion.ids == (*tokenizer(row["completion"][0]["content"])["input_ids"], tokenizer.eos_token_id)
        expected = kl_alone(student, teacher, processor, theirs, row, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.views[0].kl), expected, rtol=1e-3, atol=1e-4)
        assert [one.alt.split(",")[0] for one in completion.pictures] == [
            f"image {i + 1} of {len(row['images'])}" for i in range(len(row["images"]))
        ]
        text = row["prompt"][0]["content"]
        assert completion.prompt == f"user: {' '.join([*['[image]'] * len(row['images']), text])}"


def data_of(path: Path) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def test_a_report_during_training_shows_what_the_student_saw(tmp_path):
    """The teacher has another processor. Without a step, the report's KL is that of full logits."""
    teacher, theirs = vision_pair("idefics3", seed=1, resolution=32)
    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    settings = {"teacher": str(tmp_path / "teacher"), "learning_rate": 0.0, "max_steps": 1, "top_k": 1}
    trainer = make(tmp_path / "out", "idefics3", **settings)
    report = TokenReport(every=1, rows=4)
    trainer.add_callback(report)
    trainer.train()
    found = data_of(tmp_path / "out" / "reports" / "step-000001.html")
    assert [len(row["pictures"]) for row in found["rows"]] == [1, 0, 2, 1]
    assert len(found["pictures"]) == 4
    student, processor = vision_pair("idefics3", seed=0)
    for row, given in zip(report._table(1).completions, rows(), strict=True):
        expected = kl_alone(student, teacher, processor, theirs, given, row.ids)
        torch.testing.assert_close(torch.tensor(row.views[0].kl), expected, rtol=1e-3, atol=1e-4)


def test_prompts_with_images_for_a_text_model_are_refused(tmp_path):
    seen = [{"prompt": [{"role": "user", "content": "a"}], "image": picture()}]
    with pytest.raises(ValueError, match=r"`TokenReport` was given prompts with images, but the student is a text"):
        OPDTrainer(
            model=make_model(seed=1),
            teacher_model=make_model(seed=2),
            args=config(tmp_path),
            train_dataset=rows().remove_columns(["images", "completion"]).map(lambda row: {"prompt": "a b"}),
            processing_class=make_tokenizer(),
            callbacks=[TokenReport(prompts=seen)],
        )

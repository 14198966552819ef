"""What the tests of teachers share: a trainer of tiny models, two teachers by name, and a teacher behind a server."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import EOS, config, make_model
from teacher_server import TeacherServer

from trl_distill import OPDTrainer
from trl_distill.teachers.server import ServedTeacher


PASSED = ("train_dataset", "peft_config", "model", "environment_factory")  # beside the configuration


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(**changes):
        given = {name: changes.pop(name) for name in PASSED if name in changes}
        teacher_model = changes.pop("teacher_model", "copy")
        return OPDTrainer(
            **{
                "model": copy.deepcopy(student),
                "teacher_model": copy.deepcopy(teacher)
                if isinstance(teacher_model, str) and teacher_model == "copy"
                else teacher_model,
                "args": config(tmp_path, **changes),
                "train_dataset": prompts,
                "processing_class": tokenizer,
                **given,
            }
        )

    return build


@pytest.fixture
def pair():
    return {"math": make_model(seed=3, hidden_size=24), "code": make_model(seed=4)}


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.fixture
def server(model):
    with TeacherServer(model) as server:
        yield server


@pytest.fixture
def ask():
    """Makes teachers with short time-outs, and closes them."""
    teachers = []

    def make(urls: Any, name: str = "teacher", top_k: int = 0, **changes: Any) -> ServedTeacher:
        teachers.append(ServedTeacher(urls, name, top_k, **{"timeout": 20, "backoff": 0.01, **changes}))
        return teachers[-1]

    yield make
    for teacher in teachers:
        teacher.close()

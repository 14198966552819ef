"""Tokenizers are loaded once; trainers on tiny models with their vocabularies."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
from datasets import Dataset
from helpers import config
from real_tokenizers.families import folder_of, tiny_model
from transformers import AutoTokenizer

from trl_distill import OPDTrainer


@pytest.fixture(scope="session")
def tokenizer_of():
    """A tokenizer by its family's name, for tests that do not change it."""
    return functools.cache(lambda name: AutoTokenizer.from_pretrained(folder_of(name)))


@pytest.fixture
def own_tokenizer_of(tokenizer_of):
    """A copy that the test, and the trainers in it, may change."""
    return functools.cache(lambda name: copy.deepcopy(tokenizer_of(name)))


@pytest.fixture
def saved_teacher(tmp_path):
    """The folder of a tiny teacher with its tokenizer, by its family's name."""

    def save(name: str) -> str:
        tiny_model(name, seed=2).save_pretrained(tmp_path / name)
        for file in folder_of(name).iterdir():
            shutil.copy(file, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def make_trainer(tmp_path, own_tokenizer_of):
    """A trainer for prompts; the teacher is a tiny model without a tokenizer if none is given."""

    def make(name: str, prompts: list, teacher=None, columns=None, **settings) -> OPDTrainer:
        return OPDTrainer(
            model=tiny_model(name, seed=1),
            teacher_model=tiny_model(name, seed=2) if teacher is None else teacher,
            args=config(tmp_path / "out", max_steps=1, **settings),
            train_dataset=Dataset.from_dict({"prompt": prompts, **(columns or {})}),
            processing_class=own_tokenizer_of(name),
        )

    return make

"""Tiny models, a tokenizer and datasets, made on the spot; nothing is fetched."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile


os.environ.pop("COLUMNS", None)  # pytest-xdist hands its terminal's width on; what is printed would hang on it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "TRACKIO_DIR" not in os.environ:  # TRL imports trackio, which reads it once; the user's own runs stay as they are
    os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
    atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

import pytest
import torch
from datasets import Dataset
from helpers import make_model, make_tokenizer


def _skipped_browser_tests(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    return sum("test_browser.py" in report.nodeid for report in skipped)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("BROWSER_REQUIRED") and _skipped_browser_tests(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of all: what was not run, and how to get it."""
    if _skipped_browser_tests(config):
        print(
            "NOT RUN: the report's tests in a browser; playwright and a Chromium are needed (Debian: apt-get install "
            "chromium)."
        )


@pytest.fixture(autouse=True)
def warnings_are_heard():
    """Studies silence the library in their process; what runs after them in the same one must not be silent."""
    yield
    for name in ("trl_distill", "trl", "transformers.trainer", "accelerate"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # tiny matrices: threads cost more than they bring


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    """32 prompts of unequal length."""
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    return Dataset.from_dict({"prompt": [" ".join([*words[i % 8 :][: 1 + i % 5], words[i // 8]]) for i in range(32)]})


@pytest.fixture
def student():
    return make_model(seed=1)


@pytest.fixture
def teacher():
    return make_model(seed=2, hidden_size=24)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Folders of a saved student and teacher, tokenizer included."""
    for name, seed, hidden_size in (("student", 1, 16), ("teacher", 2, 24)):
        make_model(seed=seed, hidden_size=hidden_size).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path

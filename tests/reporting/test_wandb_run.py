"""wandb end to end, offline: what a run says of itself, read back from the file that it leaves."""

from __future__ import annotations

import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import config, make_model
from transformers import AutoModelForCausalLM

from trl_distill import OPDTrainer, ServedTeacher
from trl_distill.models.properties import name_of
from trl_distill.teachers.self_distillation import AdapterOff


wandb = pytest.importorskip("wandb")


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: wandb's protocol buffers in LevelDB's log format, after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, block = path.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:  # no room for a header: padding
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_back(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and summary of an offline run; nested keys are joined by dots."""
    found: dict[str, dict[str, Any]] = {"config": {}, "summary": {}}
    for record in records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        for item in getattr(record, kind).update if kind in found else ():
            found[kind][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found["config"], found["summary"]


def short(completions, **_: Any) -> list[float]:
    return [1.0 / (1 + len(str(c))) for c in completions]


@pytest.fixture
def run_offline(tmp_path, monkeypatch, student, saved, tokenizer, prompts):
    """Trains two steps with wandb offline; returns the run's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")

    def train(teacher_model: Any, reward_funcs: Any = None, route: bool = False, **changes: Any) -> Path:
        args = config(tmp_path / "out", report_to="wandb", log_completions=True, beta=0.5, **changes)
        trainer = OPDTrainer(
            model=student,
            teacher_model=teacher_model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=prompts.add_column("teacher", ["a", "b"] * 16) if route else prompts,
            processing_class=tokenizer,
        )
        trainer.train()
        folder = Path(wandb.run.dir).parent
        wandb.finish()
        wandb.teardown()  # waits for the process that writes the file; `finish` alone may return before it is whole
        return folder

    yield train
    wandb.teardown()


def test_a_run_with_rewards_says_all_of_itself(run_offline, saved):
    teacher = str(saved / "teacher")
    folder = run_offline(AutoModelForCausalLM.from_pretrained(teacher), short, num_generations=2)
    settings, summary = read_back(folder)
    assert (settings["beta"], settings["divergence"], settings["kl_estimator"]) == (0.5, "reverse_kl", "full")
    assert settings["teachers"] == {"teacher": teacher}
    assert settings["reward_funcs"] == ["short"]
    assert settings["student"] == "Qwen3ForCausalLM"  # made in memory: its class is all that is known
    assert summary["train/distill/beta"] == 0.5
    assert summary["train/distill/reverse_kl"] > 0
    assert summary["train/reward"] > 0
    table = json.loads((folder / "files" / summary["completions.path"]).read_text())
    assert {"step", "prompt", "completion", "short", "advantage"} == set(table["columns"])
    assert len(table["data"]) == 4
    picture = folder / "files" / summary["plots/training.path"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    size = summary["plots/training.width"], summary["plots/training.height"]
    assert size == (1650, 1320)  # three rows of two panels


def test_a_run_without_rewards_has_neither_reward_nor_its_column(run_offline, saved):
    folder = run_offline({"a": str(saved / "teacher"), "b": make_model(seed=3)}, route=True)
    settings, summary = read_back(folder)
    assert settings["teachers"] == {"a": str(saved / "teacher"), "b": "Qwen3ForCausalLM"}
    assert settings["reward_funcs"] == []
    assert "train/reward" not in summary
    table = json.loads((folder / "files" / summary["completions.path"]).read_text())
    assert {"prompt", "completion"} <= set(table["columns"])
    assert "no_reward" not in table["columns"]


def test_without_matplotlib_the_run_ends_well_and_says_what_is_missing(run_offline, saved, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING, "trl_distill"):
        folder = run_offline(str(saved / "teacher"))
    assert "pip install 'trl_distill[demo]'" in caplog.text
    assert "plots/training.path" not in read_back(folder)[1]


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        (ServedTeacher("http://localhost:1", model="served-name"), "served-name"),
        (AdapterOff(), "AdapterOff"),
    ],
)
def test_names_of_teachers(teacher, name):
    assert name_of(teacher) == name

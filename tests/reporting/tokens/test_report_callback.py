"""`TokenReport` in training: what it writes, and that training does not notice."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import config, make_model
from peft import LoraConfig

from trl_distill import OPDTrainer, ServedTeacher, TokenReport
from trl_distill.reporting.tokens import callback as module


@pytest.fixture
def trained(tmp_path, tokenizer, prompts):
    """Trains with sampling (no `top_k=1`), so that every random number counts."""

    def train(*callbacks, folder: str = "out", teacher=None, before=None, **changes):  # `teacher=False`: none
        peft_config = changes.pop("peft_config", None)
        reward_funcs = changes.pop("reward_funcs", None)
        settings = {"top_k": 0, "max_steps": 3, **changes}
        trainer = OPDTrainer(
            model=make_model(seed=1, attention_dropout=0.2),
            teacher_model=make_model(seed=2, hidden_size=24) if teacher is None else teacher or None,
            args=config(tmp_path / folder, **settings),
            train_dataset=prompts,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=peft_config,
            reward_funcs=reward_funcs,
        )
        if before is not None:
            before(trainer)
        trainer.train()
        return trainer

    return train


def data_of(path: Path) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def written(trainer) -> list[str]:
    return sorted(path.name for path in (Path(trainer.args.output_dir) / "reports").iterdir())


def test_a_report_every_so_many_steps_and_at_the_end(trained):
    trainer = trained(TokenReport(every=2, rows=5, num_generations=2, batch_size=4))
    assert written(trainer) == ["step-000002.html", "step-000003.html"]
    found = data_of(Path(trainer.args.output_dir) / "reports" / "step-000003.html")
    assert [row["prompt"] for row in found["rows"]] == [p for p in trainer.train_dataset[:5]["prompt"] for _ in "ab"]
    assert found["summaries"][0]["kl"] > 0.01


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward_funcs": [lengths], "num_generations": 2, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"teacher": False, "teacher_ema": 0.9, "beta": 0.5, "reward_funcs": [lengths], "num_generations": 2},
    ],
    ids=["plain", "rewards", "bf16", "moving average"],
)
def test_training_is_the_same_bit_for_bit_with_and_without_it(trained, settings):
    plain = trained(folder="plain", **settings)
    watched = trained(TokenReport(every=1, rows=3, reward_funcs=[lengths]), folder="watched", **settings)
    assert len(written(watched)) == 3
    logs = [
        [{name: value for name, value in log.items() if not re.search("time|per_second", name)} for log in history]
        for history in (plain.state.log_history, watched.state.log_history)
    ]
    assert json.dumps(logs[0]) == json.dumps(logs[1])
    pairs = zip(plain.model.named_parameters(), watched.model.named_parameters(), strict=True)
    assert all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


def test_numbers_are_those_that_training_logs(trained):
    """Greedy and without a step in between: the KL in the report is the one that is minimised."""
    rows = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"]})
    report = TokenReport(prompts=rows, rows=4)
    trainer = trained(report, max_steps=1, learning_rate=0.0)
    table = report._table(1)
    trainer.model.eval()
    for row in table.completions:
        ids = trainer.token_ids_of([row.prompt])[0]
        both = torch.tensor([[*ids, *row.ids]])
        with torch.no_grad():
            q, p = (model(input_ids=both).logits[0, len(ids) - 1 : -1] for model in (trainer.model, trainer.ref_model))
        kl = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(torch.tensor(row.views[0].kl), kl, rtol=1e-3, atol=1e-4)


def test_the_students_own_base_as_teacher(trained):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trained(TokenReport(rows=3), teacher="adapter-off", peft_config=lora)
    found = data_of(Path(trainer.args.output_dir) / "reports" / "step-000003.html")
    assert found["summaries"][0]["kl"] > 1e-4


def test_a_callback_that_is_added_later(trained):
    report = TokenReport(rows=2)
    trainer = trained(before=lambda trainer: trainer.add_callback(report))
    assert written(trainer) == ["step-000003.html"]


def test_a_report_that_fails_is_a_warning(trained, caplog):
    def broken(**_):
        raise RuntimeError("no judge today")

    with caplog.at_level(logging.WARNING, "trl_distill"):
        trainer = trained(TokenReport(every=1, rows=2, reward_funcs=[broken]))
    assert trainer.state.global_step == 3
    assert (
        "report of step 2 could not be made: The reward function 'broken' failed: RuntimeError: no judge today"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("report", "changes", "message"),
    [
        ({}, {"teacher": ServedTeacher("http://x", "s", top_k=64), "kl_estimator": "topk"}, "A served teacher gives"),
        ({}, {"teacher": {"a": make_model(seed=2), "b": make_model(seed=3)}}, "several teachers"),
        ({"teacher": "c"}, {}, "no such teacher"),
        ({"prompts": []}, {}, "at least one row"),
        ({"prompts": [{"question": "a"}]}, {}, "a prompt in each"),
        ({}, {"beta": 0.0, "teacher": False, "reward_funcs": [lengths], "num_generations": 2}, "has none"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_training(trained, prompts, monkeypatch, report, changes, message):
    monkeypatch.setattr(ServedTeacher, "check", lambda self: None)
    with pytest.raises(ValueError, match=message):
        trained(TokenReport(**report), before=lambda _: pytest.fail("the trainer was made"), **changes)


def test_sharded_weights_are_refused(trained, monkeypatch):
    monkeypatch.setattr(module, "is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"ZeRO-3 and FSDP.*trl-distill report"):
        trained(TokenReport())


@pytest.mark.parametrize("name", ["every", "rows", "num_generations", "batch_size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        TokenReport(**{name: 0})


def test_wandb_gets_the_page_as_it_is(trained, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        trainer = trained(TokenReport(every=2, rows=2), report_to="wandb")
        folder = Path(wandb.run.dir)
        wandb.finish()
    finally:
        wandb.teardown()
    sent = {path.read_text() for path in folder.glob("media/html/**/*.html")}
    assert sent == {path.read_text() for path in (Path(trainer.args.output_dir) / "reports").iterdir()}

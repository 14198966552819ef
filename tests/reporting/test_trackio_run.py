"""Trackio end to end: what a run says of itself, read back from the database and files that it leaves."""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from datasets import Dataset
from helpers import config, make_tokenizer
from processes import run
from transformers import TrainerCallback
from transformers.integrations import TrackioCallback

from trl_distill import OPDTrainer, TokenReport
from trl_distill.cli import report as report_command


trackio = pytest.importorskip("trackio")


FOLDER = Path(os.environ["TRACKIO_DIR"])


def rows(project: str, table: str, column: str) -> list[dict[str, Any]]:
    """A column of JSON in the project's database, in the order of time."""
    with closing(sqlite3.connect(FOLDER / f"{project}.db")) as connection:
        return [orjson.loads(value) for (value,) in connection.execute(f"SELECT {column} FROM {table} ORDER BY id")]


def media(found: dict[str, Any]) -> bytes:
    """The file that a logged picture or page lies in."""
    return (FOLDER / "media" / found["file_path"]).read_bytes()


def last(project: str, key: str) -> Any:
    """The last value that was logged under a key."""
    return [row[key] for row in rows(project, "metrics", "metrics") if key in row][-1]


def short(completions, **_: Any) -> list[float]:
    return [1.0 / (1 + len(str(c))) for c in completions]


@pytest.fixture
def trained(tmp_path, student, saved, tokenizer, prompts):
    """Trains two steps that report to Trackio."""

    def train(project: str, callbacks: Any = None, later: Any = None, **changes: Any) -> OPDTrainer:
        settings = {"report_to": "trackio", "project": project, "log_completions": True, "beta": 0.5, **changes}
        dataset, processing = settings.pop("dataset", prompts), settings.pop("tokenizer", tokenizer)
        reward_funcs = settings.pop("reward_funcs", None)
        trainer = OPDTrainer(
            model=student,
            teacher_model=str(saved / "teacher"),
            reward_funcs=reward_funcs,
            args=config(tmp_path / "out", **settings),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=processing,
            callbacks=callbacks,
        )
        if later is not None:
            trainer.add_callback(later)
        trainer.train()
        return trainer

    yield train
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


def test_a_run_says_all_of_itself(trained, saved):
    trained("all", [TokenReport(every=1, rows=2)], reward_funcs=short, num_generations=2)
    (settings,) = rows("all", "configs", "config")
    assert (settings["beta"], settings["divergence"], settings["kl_estimator"]) == (0.5, "reverse_kl", "full")
    assert settings["teachers"] == {"teacher": str(saved / "teacher")}
    assert settings["reward_funcs"] == ["short"]
    assert settings["student"] == "Qwen3ForCausalLM"
    logged = [row for row in rows("all", "metrics", "metrics") if "train/distill/reverse_kl" in row]
    assert [row["train/global_step"] for row in logged] == [1, 2]
    assert all(row["train/distill/reverse_kl"] > 0 and row["train/reward"] > 0 for row in logged)
    completions = last("all", "completions")
    assert completions["_type"] == "trackio.table"
    assert set(completions["_value"][0]) == {"step", "prompt", "completion", "short", "advantage"}
    assert len(completions["_value"]) == 4
    picture = last("all", "plots/training")
    assert picture["_type"] == "trackio.image"
    assert media(picture).startswith(b"\x89PNG")


def test_every_token_report_arrives_as_it_is_the_last_one_too(trained, tmp_path):
    trained("pages", later=TokenReport(every=1, rows=2))  # added last, and yet before the run is closed
    pages = [row for row in rows("pages", "metrics", "metrics") if "reports/tokens" in row]
    assert [row["train/global_step"] for row in pages] == [1, 2]
    written = sorted((tmp_path / "out" / "reports").glob("*.html"))
    assert [media(row["reports/tokens"]) for row in pages] == [path.read_bytes() for path in written]


def test_facts_are_there_even_if_an_evaluation_logs_first(trained):
    trained("evaluated", eval_strategy="steps", eval_on_start=True, eval_steps=1, per_device_eval_batch_size=4)
    (settings,) = rows("evaluated", "configs", "config")
    assert "teacher" in settings["teachers"]
    assert last("evaluated", "eval/distill/reverse_kl") > 0


def test_messages_are_logged_as_completions(trained):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"a {c}"}] for c in "bcdefghi"]})
    trained("messages", dataset=dataset, tokenizer=tokenizer)
    first = last("messages", "completions")["_value"][0]
    assert first["prompt"][0]["content"].startswith("a ")
    assert first["completion"][0]["role"] == "assistant"


def test_secrets_are_masked_everywhere(trained):
    trained(
        "secrets",
        hub_token="hf_abcdefghijklmnopqrstuvwx",
        teacher_model_init_kwargs={"token": "secretsecretsecret"},
    )
    (settings,) = rows("secrets", "configs", "config")
    assert settings["teacher_model_init_kwargs"] == {"token": "***"}
    stored = b"".join(path.read_bytes() for path in FOLDER.rglob("secrets*") if path.is_file())
    assert b"train/distill" in stored
    assert b"abcdefghijklmnop" not in stored
    assert b"secretsecret" not in stored


def test_a_run_with_the_same_name_goes_on(trained):
    trained("resumed", run_name="one", save_strategy="steps", save_steps=1, max_steps=1)
    trained("resumed", run_name="one", max_steps=2)
    with closing(sqlite3.connect(FOLDER / "resumed.db")) as connection:
        assert connection.execute("SELECT COUNT(DISTINCT run_id) FROM metrics").fetchone() == (1,)


def test_a_callback_of_the_users_own_stays(trained):
    class Own(TrackioCallback):
        pass

    class Late(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            trackio.log({"late": 1.0})

    trainer = trained("own", [Own(), Late()], report_to="none")
    assert isinstance(trainer.callback_handler.callbacks[-1], Own)
    assert last("own", "late") == 1.0


def test_the_report_command_logs_its_page_as_a_run(saved, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "c d"}\n')
    monkeypatch.setattr("trl_distill.reporting.trackers.PROJECT", "alone")
    output = tmp_path / "report.html"
    words = f"--model_name_or_path {saved / 'student'} --teacher_model_name_or_path {saved / 'teacher'} "
    words += f"--dataset_name {tmp_path / 'prompts.jsonl'} --output {output} --max_completion_length 4 "
    report_command.main([*words.split(), "--report_to", "trackio", "--device", "cpu"])
    (settings,) = rows("alone", "configs", "config")
    assert settings["teacher"] == str(saved / "teacher")
    assert media(last("alone", "reports/tokens")) == output.read_bytes()


def test_without_trackio_training_works_and_its_name_is_refused_at_once():
    code = (
        "import sys; sys.modules['trackio'] = None\n"
        "from helpers import config, make_model, make_tokenizer\n"
        "from datasets import Dataset\n"
        "from trl_distill import OPDTrainer\n"
        "def train(report_to):\n"
        "    data = Dataset.from_dict({'prompt': ['a b'] * 8})\n"
        "    args = config('out', report_to=report_to, max_steps=1)\n"
        "    pair = {'model': make_model(seed=1), 'teacher_model': make_model(seed=2)}\n"
        "    OPDTrainer(**pair, args=args, train_dataset=data, processing_class=make_tokenizer()).train()\n"
        "train('none')\n"
        "print('trained')\n"
        "train('trackio')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = run([sys.executable, "-c", code], env=environment)
    assert "trained" in done.stdout, done.stderr[-2000:]
    assert "pip install trackio" in done.stderr

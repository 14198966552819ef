"""`trl-distill plot`: logs in, one picture out."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest

from trl_distill.reporting.curves import training_figure
from trl_distill.reporting.summary_table import SummaryTable, closing_table


LOG = [
    {
        "step": step,
        "distill/reverse_kl": 1 / step,
        "distill/forward_kl": 2 / step,
        "reward": step / 10,
        "entropy": 0.5,
        "distill/teacher_entropy": 0.4,
        "completions/mean_length": 40.0,
    }
    for step in range(1, 11)
]


@pytest.fixture
def main(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return importlib.import_module("trl_distill.cli.plot").main


def test_a_run_s_picture_lies_in_its_folder(main, capsys, tmp_path):
    main(["a"])
    assert (tmp_path / "a" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "The picture is in a/training.png" in capsys.readouterr().out


def test_the_newest_checkpoint_s_log_is_found(main, tmp_path):
    for step in (5, 40):
        folder = tmp_path / "c" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG[:step]}))
    module = importlib.import_module("trl_distill.cli.plot")
    assert len(module.log_of(tmp_path / "c")) == 10


def test_several_runs_with_the_teacher_s_level(main, tmp_path):
    found = {"models": {"big": {"estimates": {"avg@4": {"value": 0.9, "low": 0.8, "high": 1.0}}}}}
    (tmp_path / "found.json").write_text(json.dumps(found))
    main(
        [
            "a",
            "b",
            "--labels",
            "x",
            "y",
            "--evaluation",
            "found.json",
            "--teacher_model_name_or_path",
            "big",
            "--output",
            "both.png",
        ]
    )
    assert (tmp_path / "both.png").exists()


@pytest.mark.parametrize("name", ["[/INST]", "$x^$", "$\\frac$", "_x", "a$b$c"])
def test_names_are_shown_as_they_are_written(main, tmp_path, capsys, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    main(["a", name, "--labels", "a", name, "--title", name, "--output", f"{name}/both.png"])
    main([name, "a", "--output", "found.png"])
    assert f"The picture is in {name}/both.png" in capsys.readouterr().out
    legend = training_figure({"a": LOG, name: LOG}).legends[0]
    assert legend.get_texts()[1].get_text().replace(r"\$", "$").strip() == name


def test_numbers_that_are_null_or_nan(main, tmp_path):
    """Logs and evaluations of runs without scores."""
    log = [{**row, "reward": None if row["step"] < 5 else math.nan} for row in LOG]
    (tmp_path / "a" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    found = {"models": {"big": {"estimates": {"avg@4": {"value": None, "low": None, "high": None}}}}}
    (tmp_path / "found.json").write_text(json.dumps(found))
    main(["a", "--evaluation", "found.json", "--teacher_model_name_or_path", "big"])
    assert (tmp_path / "a" / "training.png").exists()


def test_what_the_picture_holds():
    figure = training_figure({"x": LOG, "y": LOG}, {"reward": 0.9})
    panels = {axis.get_title("left"): axis for axis in figure.axes if axis.get_visible()}
    assert len(panels) == 4
    assert len(panels["KL to the teacher, nats per token"].lines) == 4  # two directions, two runs
    assert len(panels["reward"].lines) == 3  # and the teacher's level
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "holds no log"),
        (["a", "b/trainer_state.json", "a"], "Two runs have the same name"),
    ],
)
def test_what_cannot_be_drawn(main, words, message):
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert message in str(raised.value)


def test_the_last_table_compares_beginning_and_end():
    table = closing_table(LOG)
    cells = dict(
        zip(table.columns[0].cells, zip(table.columns[1].cells, table.columns[2].cells, strict=True), strict=True)
    )
    assert cells["KL(student ‖ teacher), nats per token"] == ("1", "0.1")
    assert cells["reward"] == ("0.1", "1")
    assert closing_table([{"step": 1, "loss": 0.0}]) is None


def test_a_terminal_without_such_signs_does_not_end_a_run(monkeypatch, caplog):
    """The model is saved after training has ended, so what is shown there must not be in its way."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    state = SimpleNamespace(log_history=LOG, is_world_process_zero=True)
    SummaryTable().on_train_end(None, state, None)
    assert "Set PYTHONIOENCODING=utf-8" in caplog.text

"""`scripts/reproduce.py` in miniature: runs are kept, reports come from their files."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from helpers import config, in_training


SCRIPTS = Path(__file__).parents[2] / "scripts"
NOT_RUN_YET: set[str] = set()  # arms whose results the page does not have yet


@pytest.fixture
def module(monkeypatch):
    pytest.importorskip("matplotlib")
    return importlib.import_module("scripts.studies.reproduce.run")


def test_the_orders_verifier(module):
    tasks = importlib.import_module("scripts.studies.tasks.table")
    rows = tasks.orders(50, 1)
    assert tasks.in_any_order(rows["solution"], rows["answer"]) == [1.0] * 50
    assert tasks.in_any_order(["12345", "11345", "1234", "123456"], ["54321"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert rows["prompt"] == tasks.orders(50, 1)["prompt"] != tasks.orders(50, 2)["prompt"]


def test_the_last_number_of_a_text_is_its_answer(module):
    tasks = importlib.import_module("scripts.studies.tasks.table")
    texts = ["3 + 4 = 7\n#### 1,007", "no number", "It is -2.50.", "12 of 13"]
    assert tasks.ends_with(texts, ["1007", "1", "-2.5", "12"]) == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claim", "arm"),
    [
        ("gap", "sft-then-slower"),
        ("diversity", "mixed"),
        ("rewards", "both-0.1"),
        ("estimators", "top-4"),
        ("controls", "another-problem"),
        ("controls", "fixed-advantage"),
    ],
)
def test_the_larger_preset_with_small_models_in_their_place(module, tmp_path, monkeypatch, claim, arm):
    """In its own precision and micro-batches; models and problems are the demo's, since the hub's are out of reach."""
    tasks = importlib.import_module("scripts.studies.tasks.table")
    small = dataclasses.replace(tasks.TASKS["additions"], name="gsm8k", limit=16)
    monkeypatch.setitem(tasks.TASKS, "gsm8k", small)
    monkeypatch.setitem(module.PRESETS, "gpu", dataclasses.replace(module.PRESETS["gpu"], device="cpu"))
    monkeypatch.setattr(
        importlib.import_module("scripts.studies.reproduce.claims"), "measured", lambda *_, **__: {"avg@4": 0.5}
    )
    module.prepare(claim, tmp_path, "gpu")
    module.run(claim, arm, 0, tmp_path, 0.02, "gpu")
    found = json.loads(module.path_of(tmp_path, claim, arm, 0).read_text())
    assert found["cost"]["trained"] > 0
    assert module.parse(["--preset", "gpu"]).claims == ["gap", "diversity", "rewards", "estimators", "controls"]


def test_the_control_without_a_teacher_has_one_advantage_for_all(module, tmp_path, tokenizer, prompts, student):
    training = importlib.import_module("scripts.studies.reproduce.training")
    rewards = [0.0, 1.0, 2.0, 5.0]
    trainer = in_training(
        training.FixedAdvantage(
            model=student,
            reward_funcs=lambda completions, **_: rewards,
            args=config(tmp_path, beta=0.0, num_generations=1, reward_baseline="batch"),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    batch = trainer._generate_and_score_completions([{"prompt": text} for text in "abcd"])
    assert batch["rewards"].tolist() == rewards
    assert batch["advantages"].tolist() == [-1.0] * 4


@pytest.mark.slow
def test_a_claim_from_the_first_run_to_the_page(module, tmp_path, capsys):
    """One arm is trained; a second call trains nothing; table, picture and numbers come from the runs' files."""

    options = module.parse(["gap", "--size", "0.02", "--seeds", "0", "--output_dir", str(tmp_path / "out")])
    module.run("gap", "on-policy", 0, options.output_dir, options.size)
    path = module.path_of(options.output_dir, "gap", "on-policy", 0)
    before = path.read_text()
    found = json.loads(before)
    generated, trained, _ = found["cost"]["curve"][-1]
    assert generated == trained > 0
    assert 0 <= found["final"]["avg@4"] <= 1
    assert module.is_done(path, 0.02)
    assert not module.is_done(path, 1.0)
    options.report_only = True
    assert module.main(options) == 0
    assert path.read_text() == before
    assert "SFT on teacher samples gets most of the way" in " ".join(capsys.readouterr().out.split())


def test_the_larger_preset_without_a_gpu(module, capsys, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert module.main(module.parse(["gap", "--preset", "gpu"])) == 1
    assert "needs a GPU" in capsys.readouterr().out


def test_tables_are_means_with_their_ends(module):
    report = importlib.import_module("scripts.studies.reproduce.report")
    assert report.spread([0.9, 0.8, 1.0], ".0%") == "90% (80%–100%)"
    assert report.spread([float("inf"), 4.0], ".0f") == "4 on 1 of 2 seeds"
    assert report.spread([float("inf")] * 2, ".0f") == "not reached"
    records = importlib.import_module("scripts.studies.reproduce.records")
    runs = [
        {
            "claim": "gap",
            "arm": arm,
            "seed": seed,
            "size": 1.0,
            "seconds": 60,
            "final": {"avg@4": 0.5 + seed / 10, "kl": 0.1},
            "cost": {"generated": 2000, "trained": 1000, "curve": [[0, 0, 0.2], [2000, 1000, 0.7]]},
        }
        for arm in ("a", "b")
        for seed in (0, 1)
    ]
    runs = [records.RunRecord.from_json(one) for one in runs]
    head, *rows = report.cells("gap", runs)
    assert head[:2] == ["", "accuracy"]
    assert rows[0][:4] == ["a", "55.0% (50.0%–60.0%)", "0.100 (0.100–0.100)", "2 (2–2)"]
    assert report.figure("gap", runs) is not None
    assert report.figure("controls", runs) is None


def test_the_page_is_filled_in_place(module, tmp_path):
    report = importlib.import_module("scripts.studies.reproduce.report")
    (tmp_path / "images").mkdir()
    page = "before\n<!-- results controls: begin -->\nold\n<!-- results controls: end -->\nafter\n"
    (tmp_path / "results.md").write_text(page)
    records = importlib.import_module("scripts.studies.reproduce.records")
    one = {"claim": "controls", "arm": "teacher", "seed": 0, "size": 1.0, "seconds": 30}
    one["final"] = {"avg@4": 0.5, "kl": 0.1}
    one["cost"] = {"generated": 1, "trained": 1, "curve": []}
    runs = [records.RunRecord.from_json(one)]
    report.write_docs({"controls": runs}, {"controls": "A sentence."}, {"cores": "2"}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| teacher | 50.0% |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert json.loads((tmp_path / "results" / "controls.json").read_text())["runs"] == [one]


@pytest.mark.parametrize("path", sorted((SCRIPTS.parent / "docs" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_results_are_read_and_give_the_tables_of_the_page(module, path):
    """Every number survives, every arm is one of the claim's, and the page shows what is made of them."""
    report = importlib.import_module("scripts.studies.reproduce.report")
    records = importlib.import_module("scripts.studies.reproduce.records")
    whole = json.loads(path.read_text())
    runs = [records.RunRecord.from_json(one) for one in whole["runs"]]
    assert json.loads(json.dumps([one.to_json() for one in runs])) == whole["runs"]
    assert [list(one.to_json()) for one in runs] == [list(one) for one in whole["runs"]]
    claim = module.CLAIMS[whole["claim"]]
    assert claim.sentence == whole["sentence"]
    labels = [arm.label for arm in claim.arms.values()]
    assert list(report.by_arm(runs)) == [label for label in labels if label not in NOT_RUN_YET]
    assert report.markdown(whole["claim"], runs) in (SCRIPTS.parent / "docs" / "results.md").read_text()


def test_names_of_arms_are_names_of_files(module):
    for claim in module.CLAIMS.values():
        for name in claim.arms:
            assert all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
        assert len({arm.label for arm in claim.arms.values()}) == len(claim.arms)


def test_every_claim_has_a_place_on_the_page(module):
    text = (SCRIPTS.parent / "docs" / "results.md").read_text()
    report = importlib.import_module("scripts.studies.reproduce.figures")
    for claim in module.CLAIMS:
        assert len(module.CLAIMS[claim].arms) <= len(report.COLOURS) == len(report.MARKERS)
        assert f"<!-- results {claim}: begin -->" in text
        assert f"<!-- results {claim}: end -->" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gap", "free lunch"], "there are no claims free lunch; choose from 'gap'"),
        (["collapse", "--preset", "gpu"], "--preset gpu cannot try collapse; it can try gap"),
        (["--preset", "gpu", "--write_docs"], "--write_docs fills the page of the small models"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
    ],
)
def test_refused(module, capsys, words, message):
    with pytest.raises(SystemExit):
        module.parse(words)
    assert message in capsys.readouterr().err


def test_a_claim_with_other_models_has_a_runner_of_its_own(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reproduce.py", "often-wrong", "--list"])
    assert module.script() == 0
    assert capsys.readouterr().out.splitlines()[0] == "70-teacher-0"

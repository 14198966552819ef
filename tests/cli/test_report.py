"""`trl-distill report` as a user runs it; and that no script of ours takes the place of a module of Python's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from processes import succeeds


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def main(monkeypatch, saved, prompts):
    """Runs the script on saved tiny models; further arguments are appended. Returns what the page holds."""
    from trl_distill.cli import report as module

    monkeypatch.chdir(saved)
    rows = [{"prompt": p, "completion": "a b c"} for p in prompts["prompt"][:5]]
    (saved / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (saved / "my_scores.py").write_text(
        "def wordy(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )

    def call(*words: str) -> dict:
        usual = (
            "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl "
            "--device cpu --max_completion_length 6"
        )
        module.main([*usual.split(), "--output", "out/report.html", *words])
        html = (saved / "out" / "report.html").read_text()
        return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])

    yield call
    sys.modules.pop("my_scores", None)


def test_no_script_has_the_name_of_a_module_of_pythons():
    ours = {path.stem for path in SCRIPTS.iterdir()}
    assert "report" in ours
    assert not ours & set(sys.stdlib_module_names)


def test_says_where_the_report_is(main, capsys):
    found = main("--num_generations", "2", "--reward_funcs", "my_scores.wordy")
    assert "The report is in out/report.html" in " ".join(capsys.readouterr().out.split())
    assert len(found["rows"]) == 10
    assert all(row["rewards"]["wordy"] == row["reward"] for row in found["rows"])


def test_the_seed_decides_and_the_batch_size_cuts(main):
    texts = [[row["texts"] for row in main("--seed", seed)["rows"]] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_completions_of_the_dataset(main):
    found = main("--completions", "dataset", "--num_prompts", "2")
    assert ["".join(row["texts"]).split() for row in found["rows"]] == [["a", "b", "c", "<eos>"]] * 2


def test_two_checkpoints_on_the_same_completions(main, saved):
    make_model(seed=3).save_pretrained(saved / "later")
    make_tokenizer().save_pretrained(saved / "later")
    found, alone = main("--compare_with", "later"), main()
    assert found["students"] == ["student", "later"]
    assert [row["texts"] for row in found["rows"]] == [row["texts"] for row in alone["rows"]]
    assert [row["views"][0] for row in found["rows"]] == [row["views"][0] for row in alone["rows"]]
    assert found["summaries"][0]["kl"] != found["summaries"][1]["kl"]
    assert found["own"][0] == found["summaries"][0]
    assert found["own"][1]["kl"] != found["summaries"][1]["kl"]  # on completions of its own


def test_an_adapters_folder(main, saved):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved / "student")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(saved / "adapter")
    make_tokenizer().save_pretrained(saved / "adapter")
    found = main("--model_name_or_path", "adapter", "--completions", "dataset")
    assert found["summaries"][0]["kl"] != main("--completions", "dataset")["summaries"][0]["kl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "nowhere"], "student 'nowhere' could not be loaded"),
        (["--teacher_model_name_or_path", "nowhere"], "teacher 'nowhere' could not be loaded"),
        (["--dataset_name", "nothing.jsonl"], "does not exist"),
        (["--dataset_split", "test"], "no split 'test'.*--dataset_split"),
        (["--reward_funcs", "no_such_module.f"], "could not be imported"),
    ],
)
def test_bad_arguments(main, words, message):
    with pytest.raises(SystemExit, match=message):
        main(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--num_prompts", "0"], "must be more than 0"), (["--output", "student"], "is a folder")],
)
def test_bad_numbers_and_folders_are_said_at_once(main, words, message, capsys):
    with pytest.raises(SystemExit):
        main(*words)
    assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(main, saved):
    make_tokenizer(["<pad>", "<eos>", *"zyxwvutsrqponmlkjihgfedcba", "."]).save_pretrained(saved / "teacher")
    with pytest.raises(SystemExit, match="token"):
        main()


def test_the_command_itself():
    assert "--compare_with" in succeeds([sys.executable, SCRIPTS / "report.py", "--help"])

"""`trl-distill report` as a user runs it; and that no script of ours takes the place of a module of Python's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import VOCAB, WORDS, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from processes import succeeds


SCRIPTS = Path(__file__).parents[2] / "scripts"


USUAL = (
    "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl "
    "--device cpu --max_completion_length 6"
)


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
        module.main([*USUAL.split(), "--output", "out/report.html", *words])
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


def test_the_likeliest_tokens(main):
    found = [main("--temperature", "0", "--seed", seed)["rows"] for seed in ("1", "2")]
    assert found[0] == found[1]
    for words in (["--num_generations", "2"], ["--completions", "dataset"]):
        with pytest.raises(SystemExit):
            main("--temperature", "0", *words)


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["<pad>", "<eos>", *"zyxwvutsrqponmlkjihgfedcba", "."],
            "`--compare_with later` has another tokenizer .* id 2 is 'a' to the first and 'z' to the second",
        ),
        ([*WORDS[:-1], "new", "."], "id 28 is '.' to the first and 'new' to the second"),
    ],
)
def test_a_second_student_with_another_tokenizer_is_refused(main, saved, words, message):
    make_model(seed=3, vocab_size=len(words)).save_pretrained(saved / "later")
    make_tokenizer(words).save_pretrained(saved / "later")
    for completions in ("sample", "dataset"):
        with pytest.raises(SystemExit, match=message):
            main("--compare_with", "later", "--completions", completions)


def test_a_second_student_with_fewer_ids_is_refused(main, saved):
    make_model(seed=3, vocab_size=VOCAB - 1).save_pretrained(saved / "later")
    make_tokenizer().save_pretrained(saved / "later")
    with pytest.raises(SystemExit, match=r"`--compare_with later` knows ids up to 27, .* produces ids up to 28"):
        main("--compare_with", "later")


@pytest.mark.parametrize("completions", ["sample", "dataset"])
def test_the_chat_template_s_arguments_hold_on_every_path(main, saved, completions):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
        "{% for m in messages %}{{ m.content }} {% if twice and m.role == 'user' %}{{ m.content }} {% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(saved / "student")

    def found(repeated: bool, teachers: bool, *words: str) -> list:
        def prompt(text: str) -> list[dict]:
            return [{"role": "user", "content": f"{text} {text}" if repeated else text}]

        row = {"prompt": prompt("a b"), "completion": [{"role": "assistant", "content": "c d"}]}
        row |= {"teacher_prompt": prompt("x")} if teachers else {}
        row |= {"tools": [{"name": "z"}]}
        (saved / "prompts.jsonl").write_text(json.dumps(row) + "\n")
        page = main("--completions", completions, *words)
        return [(row["ids"], row["teacher"], row["views"]) for row in page["rows"]]

    kwargs = ["--chat_template_kwargs", '{"twice": true}']
    for teachers in (False, True):
        assert found(False, teachers, *kwargs) == found(True, teachers) != found(False, teachers)


def test_tools_reach_the_teacher_s_own_prompt(main, saved):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(saved / "student")

    def teacher(**columns: object) -> object:
        prompts = {name: [{"role": "user", "content": "a"}] for name in ("prompt", "teacher_prompt")}
        row = {**prompts, "completion": [{"role": "assistant", "content": "c d"}], **columns}
        (saved / "prompts.jsonl").write_text(json.dumps(row) + "\n")
        return main("--completions", "dataset")["rows"][0]["teacher"]

    assert teacher(tools=[{"name": "z"}]) == teacher(teacher_prompt=[{"role": "user", "content": "z a"}]) != teacher()


def test_rewards_of_any_form(main, saved):
    (saved / "my_scores.py").write_text(
        "import math\nimport numpy as np\n"
        "async def later(completions, **_):\n    return np.array([True for _ in completions])\n"
        "def odd(completions, **_):\n    return [[math.nan, math.inf, None, 'a', 2][i] for i in range(5)]\n"
    )
    found = main("--reward_funcs", "my_scores.later", "my_scores.odd")
    assert [row["rewards"] for row in found["rows"]][-2:] == [{"later": 1.0, "odd": None}, {"later": 1.0, "odd": 2.0}]
    assert [row["reward"] for row in found["rows"]] == [1.0, 1.0, 1.0, 1.0, 3.0]


def test_a_reward_that_fails_is_named(main, saved):
    (saved / "my_scores.py").write_text("def torn(completions, **_):\n    return {}['a']\n")
    with pytest.raises(SystemExit, match="The reward function 'torn' failed: KeyError"):
        main("--reward_funcs", "my_scores.torn")


@pytest.mark.parametrize("short", ["student", "teacher", "later"])
@pytest.mark.parametrize("completions", ["sample", "dataset"])
def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(main, saved, short, completions, monkeypatch):
    rows = [{"prompt": text, "completion": "a b c d"} for text in ("a b", "a b c d e")]
    (saved / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model(seed=3).save_pretrained(saved / "later")
    make_tokenizer().save_pretrained(saved / "later")
    make_model(max_position_embeddings=9).save_pretrained(saved / short)
    words = ["--compare_with", "later", "--completions", completions]
    whose, tokens = {"later": "second student"}.get(short, short), 6 if completions == "sample" else 5
    message = f"longest prompt has 5 tokens and completions up to {tokens}, but the {whose} has 9 positions.* row 1 of"
    with monkeypatch.context() as patch:
        patch.setattr("trl_distill.cli.report.Collector.collect", pytest.fail)
        with pytest.raises(SystemExit, match=message):
            main(*words)
    main(*words, "--max_completion_length", "4")


@pytest.mark.parametrize("name", ["[/INST]", "[red]x", ":smile:", "$x^$", "<b>", "{x}"])
def test_names_are_shown_as_they_are_written(main, saved, capsys, name):
    for whose, seed in (("student", 1), ("teacher", 2)):
        make_model(seed=seed, vocab_size=VOCAB + 1).save_pretrained(saved / name / whose)
    make_tokenizer().save_pretrained(saved / name / "student")
    make_tokenizer([*WORDS, name]).save_pretrained(saved / name / "teacher")  # a warning that shows the token
    output = saved / "out" / f"{name}.html"
    words = ["--model_name_or_path", f"{name}/student", "--teacher_model_name_or_path", f"{name}/teacher"]
    found = main(*words, "--compare_with", f"{name}/student")
    assert (found["students"], found["teacher"]) == ([f"{name}/student"] * 2, f"{name}/teacher")
    from trl_distill.cli import report as module

    module.main([*USUAL.split(), *words, "--output", str(output)])
    said = capsys.readouterr().out
    assert f"The report is in {output}" in said
    assert f"The first: 29: {name!r}" in " ".join(said.split())


def test_the_command_itself():
    assert "--compare_with" in succeeds([sys.executable, SCRIPTS / "report.py", "--help"])

"""The pipeline as a whole: what each stage drops, with counts that add up, and where rows come from."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from sums import REWARD, by_stage, problems, solve

from trl_distill.data.datasets import load_splits
from trl_distill.synthetic import Completion, Refusal
from trl_distill.synthetic.work_folder import read_json


def test_every_stage_and_what_it_drops(bench, reward):
    reward(REWARD)
    good = problems(12)
    texts = {  # what the teacher says instead of the right answer
        3: "wrong 10",
        4: "12 " * 30,
        5: Completion("cut off 15", "length"),
        6: " ",
        7: "x" * 200 + " 21",
        8: Refusal("refused", "HTTP 400"),
    }

    def teacher(prompt, seed, model):
        number = int(prompt.split()[-4])
        return texts.get(number, f"number {number} it is, by careful and slow adding of all its parts, {3 * number}")

    near = [{"prompt": "So what is 1 + 2 =", "answer": "3"}]  # its row is a near duplicate of the second
    equal = [{"prompt": "what IS 2 + 4 = ", "answer": "6"}]
    no_score = [{"prompt": "What is 50 + 1 =", "answer": "?"}]
    bench.prompts([*good, *near, *equal, *no_score, "{broken", {"prompt": ""}, {"text": "no prompt"}])
    bench.teach(teacher)
    counts = bench.run(reward_funcs=["my_verifier.right"], keep="correct", max_characters=100)
    assert [row["prompt"] for row in bench.rows()] == [good[i]["prompt"] for i in (0, 1, 2, 9, 10, 11)]
    assert {name: stage["dropped"] for name, stage in by_stage(counts).items()} == {
        "read": {"broken JSON": 1, "empty prompt": 1, "no column `prompt` or `messages`": 1},
        "equal prompts": {"equal to an earlier prompt": 1},
        "ask the teachers": {"refused": 1},
        "verify": {"no reward function gives a score": 1},
        "filter": {
            "empty": 1,
            "cut off at the length limit": 1,
            "more than 100 characters": 1,
            "more than 30% repeated word 4-grams": 1,
        },
        "keep correct": {"score below 1": 1},
        "duplicates": {"near duplicate": 1},
    }
    assert {skip["where"] for skip in bench.skipped()} == {
        *("line 16", "line 17", "line 18", "prompt 8, teacher someone", "prompt 13, teacher someone")
    }
    card = (bench.out / "README.md").read_text()
    for text in ("| filter | completions | 12 | 8 | 4 |", "| someone | 6 |", "line 16", "`my_verifier.right`"):
        assert text.replace("`my_verifier.right`", "my_verifier.right") in card
    splits = load_splits(str(bench.out))
    assert splits["train"].to_list() == bench.rows()
    assert splits["train"].column_names == ["prompt", "completion", "answer", "teacher", "score"]


NANS = """
import math

def right(completions, size, **kwargs):
    assert all(s is None or math.isnan(s) or s == math.inf for s in size)
    return [math.nan if "to 2," in c else float(len(c)) for c in completions]
"""


def test_numbers_that_json_lacks_are_no_scores_and_columns_that_have_them_keep_them(sums, reward):
    reward(NANS, "nans")
    sizes = [float("nan"), float("inf"), None]
    rows = [{**row, "size": sizes[i % 3]} for i, row in enumerate(problems(6))]
    Dataset.from_list(rows).to_parquet(sums.folder / "prompts" / "train.parquet")
    counts = sums.run(reward_funcs="nans.right", dataset_name=str(sums.folder / "prompts"), keep="best")
    assert by_stage(counts)["verify"]["dropped"] == {"no reward function gives a score": 1}
    assert {str(row["size"]) for row in sums.rows()} == {"nan", "inf", "None"}
    for path in sums.folder.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=pytest.fail)


def test_best_of_n_is_chosen_among_those_that_pass_the_filters(bench, reward):
    reward("def longest(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    bench.prompts([{"prompt": f"p{i}"} for i in range(5)])
    bench.teach(lambda p, s, m: Completion(f"{p} " + "y" * (s % 7), "length" if s % 7 == 6 else "stop"))
    bench.run(reward_funcs=["my_verifier.longest"], completions_per_prompt=7, keep="best")
    assert [row["completion"] for row in bench.rows()] == [f"p{i} yyyyy" for i in range(5)]


def test_pairs(sums):
    counts = sums.run(**sums.settings, pairs=True, keep="correct", seed=2)
    rows = sums.rows()
    assert 0 < len(rows) < 10
    for row in rows:
        assert row["chosen"].split()[-1] == row["answer"] != row["rejected"].split()[-1]
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
        assert row["chosen_teacher"] == "someone"
    assert by_stage(counts)["pair"]["in"] == 10


def test_several_teachers(sums):
    teachers = {"a": "x", "b": "y"}
    every = sums.run(**sums.settings, teacher_models=teachers)
    assert by_stage(every)["ask the teachers"]["in"] == 20
    assert {(row["teacher"], row["completion"].split()[0]) for row in sums.rows()} == {("a", "x"), ("b", "y")}
    sums.out = sums.folder / "rotate"
    sums.run(**sums.settings, teacher_models=teachers, teacher_assignment="rotate")
    assert {(row["prompt"], row["teacher"]) for row in sums.rows()} == {
        (row["prompt"], "ab"[i % 2]) for i, row in enumerate(problems(10))
    }
    sums.out = sums.folder / "column"
    sums.prompts([{**row, "teacher": "b" if i == 3 else "a"} for i, row in enumerate(problems(10))])
    sums.run(**sums.settings, teacher_models=teachers, teacher_assignment="column")
    assert {row["prompt"] for row in sums.rows() if row["teacher"] == "b"} == {problems(10)[3]["prompt"]}


def test_human_share(sums):
    sums.prompts([{"prompt": f"what about {i}", "completion": f"that is {i}"} for i in range(20)], "human.jsonl")
    settings = {**sums.settings, "human_data": str(sums.folder / "human.jsonl"), "keep": "best"}
    counts = sums.run(**settings, human_share=0.5)
    assert counts["writers"] == {"someone": 10, "human": 10}
    assert counts["notes"] == []
    assert by_stage(counts)["mix in human data"]["dropped"] == {"human rows beyond their share": 10}
    counts = sums.run(**settings, human_share=0.8, overwrite=True)
    assert counts["writers"] == {"someone": 10, "human": 20}
    assert counts["notes"][0].startswith("Human rows are 66.7% of all, not the 80.0% asked for")
    assert counts["notes"][0] in (sums.out / "README.md").read_text()


def test_human_rows_that_equal_a_teachers_are_dropped(sums):
    sums.run(**sums.settings, keep="best")
    same = [{"prompt": row["prompt"], "completion": row["completion"]} for row in sums.rows()[:2]]
    sums.prompts([*same, {"prompt": "other", "completion": "one"}, {"prompt": "x"}, "{"], "human.jsonl")
    settings = {**sums.settings, "human_data": str(sums.folder / "human.jsonl"), "human_share": 0.05}
    counts = sums.run(**settings, keep="best", overwrite=True)
    assert by_stage(counts)["read human data"]["dropped"] == {
        **{"exact duplicate": 2, "broken JSON": 1},
        "no columns `prompt` and `completion`, nor `messages`": 1,
    }


def test_human_data_that_cannot_be_used_stops_before_the_teacher(sums):
    teachers = sums.teach(solve)
    sums.prompts([{"text": "x"}], "human.jsonl")
    for name, message in (
        ("human.jsonl", "none of its first 1 rows can be used: no columns"),
        ("x.jsonl", "not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            sums.run(**sums.settings, human_data=str(sums.folder / name), human_share=0.5)
    assert not teachers


def test_nothing_left_is_an_error_that_says_where_all_went(sums):
    with pytest.raises(ValueError, match=r"No row is left.*fewer than 500 characters \(30\).*completions are in"):
        sums.run(**sums.settings, min_characters=500)
    assert not sums.out.exists()
    assert sums.run(**sums.settings)["rows"] > 0  # with the completions that were kept


def test_a_verifier_that_asks_for_a_missing_column_stops_before_the_teacher(sums, reward):
    reward("def f(completions, gold):\n    return []\n", "wants_gold")
    teachers = sums.teach(solve)
    with pytest.raises(ValueError, match="asks for 'gold'"):
        sums.run(reward_funcs=["wants_gold.f"])
    assert not teachers


def test_a_column_that_most_rows_lack_reaches_the_verifier_in_every_chunk(sums):
    sums.prompts([{"prompt": row["prompt"]} for row in problems(8)] + problems(1, start=50))
    counts = sums.run(**sums.settings, keep="correct")
    assert {row["prompt"] for row in sums.rows()} <= {problems(1, start=50)[0]["prompt"]}
    assert by_stage(counts)["verify"]["kept"] == 27


def test_scores_are_bound_to_the_verifier_and_kept_for_each(sums):
    sums.run(**sums.settings)
    work = sums.folder / "out.work"
    assert len(list(work.glob("scores-*"))) == 1
    assert read_json(work / "settings.json")["completions_per_prompt"] == 3

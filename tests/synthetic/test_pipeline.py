"""The pipeline as a whole: counts that add up, and the same dataset wherever it was interrupted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tracemalloc

import pytest
from chat_server import ChatServer
from datasets import Dataset
from rich.console import Console

from trl_distill import TeacherUnavailable
from trl_distill.data.datasets import load_splits
from trl_distill.synthetic import Completion, Refusal, pipeline
from trl_distill.synthetic.work_folder import read_json


REWARD = """
def right(completions, answer, **kwargs):
    return [float(c.split()[-1:] == [a]) if a != "?" else None for c, a in zip(completions, answer, strict=True)]
"""


def solve(prompt, seed, model):
    """'1 + 2 =' -> 'steps ... 3', one in four wrong."""
    if "New task:" in prompt:
        return f"New task: And what is {seed % 1000} + {seed % 77} ="
    left, right = prompt.split()[-4], prompt.split()[-2]
    total = int(left) + int(right) + (seed % 4 == 0)
    return f"{model} adds {left} to {right}, seed {seed % 3}, and gets {total}"


def problems(count, start=0):
    return [{"prompt": f"What is {i} + {2 * i} =", "answer": str(3 * i)} for i in range(start, start + count)]


@pytest.fixture
def sums(bench, reward):
    reward(REWARD)
    bench.prompts(problems(10))
    bench.teach(solve)
    bench.settings = {"reward_funcs": ["my_verifier.right"], "completions_per_prompt": 3}
    return bench


def by_stage(counts):
    return {stage["stage"]: stage for stage in counts["stages"]}


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


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": "correct"},
        {"pairs": True},
        {"new_prompts": 6, "keep": "best"},
        {"teacher_models": {"a": "x", "b": "y"}, "keep": "best", "human_data": "human.jsonl", "human_share": 0.3},
    ],
    ids=["correct", "pairs", "new prompts", "several"],
)
def test_wherever_it_is_interrupted_the_dataset_is_the_same(sums, monkeypatch, changes):
    """Dies before and after each renaming, which is every moment at which the disk changes for a restart."""
    sums.prompts([{"prompt": f"what about {i}", "completion": f"that is {i}"} for i in range(20)], "human.jsonl")
    settings = {**sums.settings, **changes}
    complete = sums.run(**settings)
    rows, card = sums.rows(), (sums.out / "README.md").read_text()
    names = {name: getattr(os, name) for name in ("replace", "rename")}
    left = 0

    def dies(name, after):
        def call(*paths):
            nonlocal left
            left -= 1
            if left < 0 and not after:
                raise KeyboardInterrupt
            names[name](*paths)
            if left < 0:
                raise KeyboardInterrupt

        return call

    for after in (False, True):
        moment = 0
        while True:
            sums.out = sums.folder / f"out{moment}{after}"
            left = moment
            for name in names:
                monkeypatch.setattr(os, name, dies(name, after))
            try:
                sums.run(**settings)
                survived = True
            except KeyboardInterrupt:
                survived = False
            for name, function in names.items():
                monkeypatch.setattr(os, name, function)
            assert sums.run(**settings) == complete, moment
            assert sums.rows() == rows, moment
            assert (sums.out / "README.md").read_text() == card
            shutil.rmtree(sums.out)
            shutil.rmtree(f"{sums.out}.work")
            if survived:
                break
            moment += 1
        assert moment > 8


def test_a_finished_chunk_is_never_asked_about_again(sums):
    asked = []

    def away(prompt, seed, model):
        if "7 +" in prompt:
            raise TeacherUnavailable("gone")
        asked.append(prompt)
        return solve(prompt, seed, model)

    sums.teach(away)
    with pytest.raises(TeacherUnavailable):
        sums.run(**sums.settings)
    first = set(asked[: 4 * 3])
    teachers = sums.teach(solve)
    sums.run(**sums.settings)
    assert not first & set(teachers[0].asked)
    assert len(teachers[0].asked) == 6
    assert sums.run(**sums.settings)["rows"] == len(sums.rows())
    assert len(teachers) == 1  # nobody is loaded for a finished dataset


ODD = (
    {"error": {"message": "provider | failed", "code": 502}},
    {"choices": []},
    {"choices": [{"message": None, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": "cut"}, "finish_reason": None}]},
    "<html>",
)


@pytest.mark.parametrize("odd", ODD, ids=["error", "no choice", "null message", "no reason", "HTML"])
def test_a_prompt_with_an_odd_answer_is_counted_and_listed_and_the_run_goes_on(bench, odd):
    chats = [{"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(6)]
    bench.prompts(chats)
    with ChatServer(lambda text, seed: f"all about {text}") as server:
        server.alter = lambda text, answer: odd if text == "word 4" else answer
        url = f"{server.url}#m"
        counts = bench.run(teacher_model_name_or_path=url, retries=0)
        assert by_stage(counts)["ask the teachers"]["dropped"] == {"unusable answer of the endpoint": 1}
        assert [skip["where"] for skip in bench.skipped()] == ["prompt 4, teacher m"]
        assert [row["prompt"][0]["content"] for row in bench.rows()] == [f"word {i}" for i in (0, 1, 2, 3, 5)]
        assert "| prompt 4, teacher m |" in (bench.out / "README.md").read_text()
        asked = len(server.asked)
        assert bench.run(teacher_model_name_or_path=url, retries=0, overwrite=True, min_characters=2)["rows"] == 5
        assert len(server.asked) == asked  # not even the odd one is asked about again


@pytest.mark.parametrize("killed", [False, True])
def test_a_later_chunk_without_any_answer_does_not_end_a_run_that_is_resumed(bench, killed):
    bench.prompts([{"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(6)])
    with ChatServer(lambda text, seed: f"all about {text}") as server:
        server.refuse = lambda text: 400 if text in ("word 4", "word 5") else None
        settings = {"teacher_model_name_or_path": f"{server.url}#m", "retries": 0}
        if killed:  # after the first chunk
            server.refuse = lambda text: 503 if text in ("word 4", "word 5") else None
            with pytest.raises(TeacherUnavailable):
                bench.run(**settings)
            server.refuse = lambda text: 400 if text in ("word 4", "word 5") else None
        counts = bench.run(**settings)
    assert by_stage(counts)["ask the teachers"]["dropped"] == {"refused by the endpoint": 2}


def test_keys_in_request_options_are_written_nowhere(bench, caplog, capsys):
    """Also where the server repeats the request; another key is no other setting."""
    bench.prompts([{"prompt": f"p{i}"} for i in range(6)])

    def options(key):
        return {"api_key": key, "extra_headers": {"Authorization": f"Bearer {key}"}, "logprobs": 3, "max_tokens": 9}

    with ChatServer(lambda text, seed: f"{text} at {seed}") as server:
        server.alter = lambda text, answer: (
            {"error": {"message": f"{server.asked}", "code": 400}} if "p1" in text else answer
        )
        where = {"teacher_model_name_or_path": f"{server.url}#m", "retries": 0}
        assert bench.run(**where, request_options=options("sesame-one"))["rows"] == 5
        assert {body["api_key"] for body in server.asked} == {"sesame-one"}
        asked = len(server.asked)
        assert bench.run(**where, request_options=options("sesame-two"), overwrite=True, min_characters=2)["rows"] == 5
        assert len(server.asked) == asked
        with pytest.raises(ValueError, match=r"`request_options` was .*'logprobs': 3.*now .*'logprobs': 4") as error:
            bench.run(**where, request_options={**options("sesame-two"), "logprobs": 4}, overwrite=True)
    assert read_json(bench.out / "counts.json")["settings"]["request_options"]["max_tokens"] == 9
    files = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert {"settings.json", "counts.json", "README.md", "skipped.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if b"sesame" in path.read_bytes()]
    out = capsys.readouterr()
    assert (
        "sesame"
        not in f"{error.value} {caplog.text} {out.out} {out.err} {bench.config(request_options=options('sesame'))}"
    )


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


def test_a_login_in_a_url_is_written_nowhere(bench, caplog):
    bench.prompts([{"prompt": f"p{i}"} for i in range(3)])
    with ChatServer(lambda text, seed: f"{text} at {seed}.\nScore: 1") as server:
        url = server.url.replace("http://", "http://user:pa%24sword@") + "#m"
        server.refuse = lambda text: 400 if "p1" in text else None
        bench.run(teacher_models={"m": url}, judge=url)
        assert server.headers["Authorization"].startswith("Basic ")
        other = url.replace("pa%24sword", "sword2")
        assert bench.run(teacher_models={"m": other}, judge=other)["rows"] == 2  # finished, whatever the password
    files = [path for path in bench.folder.rglob("*") if path.is_file() and path.name != "prompts.jsonl"]
    assert {"settings.json", "counts.json", "README.md", "skipped.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if b"sword" in path.read_bytes()]
    assert "sword" not in caplog.text


def test_filters_and_verifiers_may_change_without_asking_the_teacher_again(sums, reward):
    sums.run(**sums.settings, keep="correct")
    correct = sums.rows()
    with pytest.raises(ValueError, match=r"other settings or inputs.*--overwrite"):
        sums.run(**sums.settings)
    teachers = sums.teach(solve)
    sums.run(**sums.settings, overwrite=True)
    assert len(sums.rows()) > len(correct)
    reward("def all_right(completions, **kwargs):\n    return [1.0] * len(completions)\n", "other_verifier")
    settings = {**sums.settings, "reward_funcs": ["other_verifier.all_right"]}
    everything = sums.run(**settings, keep="correct", overwrite=True)
    assert by_stage(everything)["keep correct"]["dropped"] == {}
    sums.run(**sums.settings, keep="correct", overwrite=True)
    assert sums.rows() == correct
    assert not teachers


def test_what_completions_hang_on_may_not_change(sums):
    sums.run(**sums.settings)
    shutil.rmtree(sums.out)
    with pytest.raises(ValueError, match=r"`temperature` was 1.0, now 0.5.*Go back to those settings"):
        sums.run(**sums.settings, temperature=0.5)
    sums.prompts(problems(11))
    with pytest.raises(ValueError, match="`dataset_digest` was"):
        sums.run(**sums.settings)


def test_a_file_without_prompts_may_be_mended(sums):
    sums.prompts(["{", {"question": "x"}])
    with pytest.raises(ValueError, match="no prompt among 2 rows"):
        sums.run(**sums.settings)
    sums.prompts(problems(2))
    assert sums.run(**sums.settings)["rows"] > 0


def test_a_folder_of_the_same_name_is_not_read_from_the_cache(sums, monkeypatch):
    """`datasets` must see another dataset in another folder, and in the same folder after it was replaced."""
    found = []
    for out, keep in (("one/out", "all"), ("two/out", "correct"), ("two/out", "best")):
        sums.out = sums.folder / out
        sums.run(**sums.settings, keep=keep, overwrite=True)
        monkeypatch.chdir(sums.out.parent)
        found.append(load_splits("out")["train"].to_list())
        assert found[-1] == sums.rows()
    assert found[0] != found[1] != found[2]


def test_a_foreign_folder_is_left_alone(sums):
    sums.out.mkdir()
    (sums.out / "precious").write_text("x")
    with pytest.raises(ValueError, match="not made by this pipeline"):
        sums.run(**sums.settings, overwrite=True)
    assert (sums.out / "precious").read_text() == "x"


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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(bench, monkeypatch):
    """Peak of Python's own memory; the index of duplicates lies on disk, behind a cache of fixed size."""

    monkeypatch.setattr(pipeline, "check_source", lambda address: None)

    class Forgetful:
        def complete(self, prompts, seed):
            return [
                [Completion(f"it is {own} and {own**2} of {p}", "stop")] for own, p in zip(seed, prompts, strict=True)
            ]

        def close(self):
            pass

    def peak(count):
        bench.out = bench.folder / f"out{count}"
        bench.prompts([{"prompt": f"What is {i} + {2 * i} = {'pad ' * 20}"} for i in range(count)])
        monkeypatch.setattr(pipeline, "load_source", lambda *_: Forgetful())
        tracemalloc.start()
        pipeline.run_pipeline(bench.config(chunk_size=64, max_repetition=1.0), Console(file=io.StringIO()))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2000)  # imports and caches
    few, many = peak(3000), peak(12_000)
    assert many < 1.15 * few

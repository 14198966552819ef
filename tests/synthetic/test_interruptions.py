"""The pipeline interrupted, resumed, changed between runs, and with servers that answer oddly; no secret is written."""

from __future__ import annotations

import io
import os
import shutil
import tracemalloc

import pytest
from chat_server import ChatServer, wait_until
from rich.console import Console
from sums import by_stage, problems, solve

from trl_distill import TeacherUnavailable
from trl_distill.data.datasets import load_splits
from trl_distill.synthetic import Completion, pipeline
from trl_distill.synthetic.work_folder import read_json


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
        status = 503 if killed else 400

        def refuse_the_second_chunk(text):
            if text in ("word 4", "word 5"):
                wait_until((bench.folder / "out.work" / "completions" / "0" / "000000.jsonl").exists)
                return status
            return None

        server.refuse = refuse_the_second_chunk
        settings = {"teacher_model_name_or_path": f"{server.url}#m", "retries": 0}
        if killed:
            with pytest.raises(TeacherUnavailable):
                bench.run(**settings)
            status = 400
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

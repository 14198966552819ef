"""Bad input is named with its line, the rest is kept; equal prompts are asked about once."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_distill.synthetic.records import PromptRow
from trl_distill.synthetic.stages.ingest import Ingest, Prompts, read_rows
from trl_distill.synthetic.work_folder import WorkFolder


def ingest(bench, lines, limit=None, routed=None, chunk_size=4):
    work = WorkFolder(bench.folder / "work")
    Ingest(work, chunk_size, routed).run(read_rows(str(bench.prompts(lines))), limit)
    return Prompts(work)


def test_each_bad_line_is_skipped_with_its_number(bench):
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    (bench.folder / "prompts.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "one"}\n'  # with a byte order mark
        b'{"prompt": "two"\n'
        b"\n"
        b'{"prompt": "  "}\n'
        b'{"question": "three"}\n'
        b'{"prompt": "f\xfcnf"}\n'
        b'{"prompt": "\\ud800"}\n'
        b"[1]\n"
        + json.dumps({"prompt": [user]}).encode()
        + b"\n"
        + json.dumps({"messages": [user, assistant]}).encode()
        + b'\n{"prompt": null}\n{"prompt": "last"}'
    )
    work = WorkFolder(bench.folder / "work")
    Ingest(work, 4).run(read_rows(str(bench.folder / "prompts.jsonl")))
    prompts = Prompts(work)
    assert [row.prompt for row in prompts.chunk(0)] == ["one", "last"]
    assert [(skip.where, skip.why) for skip in prompts.skips()] == [
        ("line 2", "broken JSON"),
        ("line 3", "empty line"),
        ("line 4", "empty prompt"),
        ("line 5", "no column `prompt` or `messages`"),
        ("line 6", "not UTF-8 text"),
        ("line 7", "not UTF-8 text"),
        ("line 8", "no JSON object"),
        ("line 9", "prompt is messages, unlike those before"),
        ("line 10", "prompt ends with an assistant's message"),
        ("line 11", "no prompt"),
    ]
    read, unique = prompts.stages
    assert (read.seen, read.kept, unique.kept) == (12, 2, 2)


def test_equal_prompts_and_other_columns(bench):
    rows = [{"prompt": "What is it?", "answer": "1", "completion": "taken out"}, {"prompt": "what  IS it? "}]
    prompts = ingest(bench, [*rows, {"prompt": "What is it!", "answer": None}])
    assert prompts.chunk(0) == [
        PromptRow(0, "What is it?", {"answer": "1"}),
        PromptRow(1, "What is it!", {"answer": None}),
    ]
    assert prompts.stages[1].dropped == {"equal to an earlier prompt": 1}
    assert prompts.columns == ["answer"]


def test_messages_are_equal_only_with_the_same_roles(bench):
    def said(*roles):
        return {"messages": [{"role": role, "content": "Hi"} for role in roles]}

    prompts = ingest(bench, [said("user", "user"), said("system", "user"), said("user", "user")])
    assert (prompts.total, prompts.text) == (2, False)


def test_chunks_and_limit(bench):
    prompts = ingest(bench, [{"prompt": f"p{i}"} for i in range(12)], limit=10)
    assert [[row.id for row in prompts.chunk(i)] for i in range(len(prompts))] == [
        *([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])
    ]


def test_routing_names_known_teachers(bench):
    prompts = ingest(bench, [{"prompt": f"p{t}", "teacher": t} for t in ("a", "b", None)], routed=["a"])
    assert [row.columns for row in prompts.chunk(0)] == [{"teacher": "a"}]
    assert prompts.stages[0].dropped == {"column `teacher` names none of the teachers": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"question": "x"}], r"no prompt among 1 rows\. line 1: no column.*\(columns: question\)"),
        (["{", "["], "line 1: broken JSON. line 2: broken JSON."),
        ([], "no prompt among 0 rows"),
        ([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}], "column 'answer' does not hold the same kind"),
    ],
)
def test_nothing_to_do_is_an_error(bench, lines, message):
    with pytest.raises(ValueError, match=message):
        ingest(bench, lines)


def test_a_second_call_reads_nothing(bench):
    first = ingest(bench, [{"prompt": "a"}]).chunk(0)

    def nothing():
        raise AssertionError
        yield

    work = WorkFolder(bench.folder / "work")
    Ingest(work, 4).run(nothing())
    assert Prompts(work).chunk(0) == first


@pytest.mark.parametrize("shape", ["disk", "parquet", "json"])
def test_other_places_to_read_from(tmp_path, shape):
    rows = Dataset.from_list([{"prompt": f"p{i}", "n": i} for i in range(3)])
    name = tmp_path / "data"
    if shape == "disk":
        DatasetDict(train=rows).save_to_disk(name)
    elif shape == "parquet":
        name.mkdir()
        rows.to_parquet(name / "train.parquet")
    else:
        name = tmp_path / "rows.json"
        name.write_text(json.dumps(rows.to_list()))
    found = list(read_rows(str(name)))
    assert [f.row for f in found] == rows.to_list()
    assert found[2].where == "row 3"
    with pytest.raises(ValueError, match="no split 'other'"):
        list(read_rows(str(name), split="other"))


def test_no_such_file():
    with pytest.raises(ValueError, match="does not exist"):
        list(read_rows("nowhere.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_login_in_the_url_of_a_dataset_is_not_shown(suffix):
    with pytest.raises(ValueError, match=r"\*\*\*@h.*does not exist") as error:
        next(read_rows(f"https://me:sesame@h/x.{suffix}"))
    assert "sesame" not in str(error.value)

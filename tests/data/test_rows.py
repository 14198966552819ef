"""One check of rows: what is converted, what is refused and why, for tables and streams alike."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from trl_distill.data.datasets import with_prompts
from trl_distill.data.rows import ROLES, RowError, check_row, flat_parts, read_prompt


def said(role, content):
    return {"role": role, "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


USER, ANSWER = said("user", "Hi"), said("assistant", "Hello")
IMAGE = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is it?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "n": 1}, None),
        ({"prompt": [USER]}, None),
        ({"prompt": [said("system", ""), USER]}, None),
        ({"prompt": [said("system", "Be short.")]}, None),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, None),
        ({"prompt": [USER, CALL, said("tool", "3")]}, None),
        ({"prompt": "Hi", "completion": "Hello", "teacher_prompt": None}, None),
        ({"prompt": "Hi", "completion": None}, None),
        ({"prompt": [USER], "messages": "kept beside a prompt"}, None),
        ({"prompt": [said("user", parts("H", "i"))]}, {"prompt": [USER]}),
        ({"prompt": [said("user", ["H", "i"])]}, {"prompt": [USER]}),
        (
            {"prompt": [said("user", [{"type": "text", "text": "Hi", "image": None}])], "n": 1},
            {"prompt": [USER], "n": 1},
        ),
        ({"prompt": [{"from": "human", "value": "Hi"}]}, {"prompt": [USER]}),
        (
            {"prompt": "Hi", "completion": [{"from": "gpt", "value": "Hello"}]},
            {"prompt": "Hi", "completion": [ANSWER]},
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}], "id": 3},
            {"prompt": [said("system", "S"), USER], "completion": None, "id": 3},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"prompt": [USER], "completion": [ANSWER]},
        ),
        ({"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"messages": [USER, ANSWER, USER]}, {"prompt": [USER, ANSWER, USER], "completion": None}),
        ({"messages": [said("user", parts("Hi")), ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        (
            {"prompt": [{"role": None, "content": None, "from": "human", "value": "Hi", "weight": 1}]},
            {"prompt": [{**USER, "weight": 1}]},
        ),
        (
            {"prompt": "Hi", "teacher_prompt": [said("user", parts("Hint"))]},
            {"prompt": "Hi", "teacher_prompt": [said("user", "Hint")]},
        ),
    ],
)
def test_rows_that_can_be_used(row, expected):
    found = check_row(row, "Row 0")
    assert found == (row if expected is None else expected)
    assert (found is row) is (expected is None)
    assert check_row(found, "Row 0") is found


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"prompt": None}, "no prompt", "Row 7 has the prompt None; .* Drop such rows"),
        ({"prompt": " \n"}, "empty prompt", "the prompt ' .*Drop such rows"),
        ({"prompt": []}, "empty prompt", r"the prompt \[\]"),
        ({"prompt": [said("user", " ")]}, "empty prompt", "the last message must have text"),
        ({"prompt": [said("user", None)]}, "empty prompt", "the last message must have text"),
        ({"prompt": 7}, "prompt is neither text nor messages", "Row 7 has the prompt 7; .* Write text, or .*'role'"),
        ({"prompt": {"role": "user"}}, "prompt is neither text nor messages", "Write text, or"),
        ({"prompt": ["Hi"]}, "prompt is neither text nor messages", "has 'Hi' in the list 'prompt', .* plain text"),
        ({"prompt": [{"content": "Hi"}]}, "prompt is neither text nor messages", "not a message"),
        ({"prompt": [USER, ANSWER]}, "prompt ends with an assistant's message", "ends with an assistant message"),
        ({"messages": [USER, ANSWER, ANSWER]}, "prompt ends with an assistant's message", "the column `completion`"),
        ({"messages": [ANSWER]}, "empty prompt", r"the prompt \[\]"),
        ({"messages": None}, "no prompt", "the prompt None"),
        ({"prompt": [said("narrator", "Hi")]}, "unknown role 'narrator'", "Write one of system, .*tool"),
        ({"prompt": [{"from": "bing", "value": "Hi"}]}, "unknown role 'bing'", "chat templates do not render"),
        ({"prompt": [said("user", IMAGE)]}, "content that is not text", "'prompt', which is not text alone.*images"),
        ({"prompt": [said("user", {"text": "Hi"})]}, "content that is not text", "not text alone"),
        ({"prompt": "Hi", "teacher_prompt": ""}, "empty prompt", "Row 7 has the teacher prompt ''"),
        ({"prompt": "Hi", "completion": ["a"]}, "completion is neither text nor messages", "in the list 'completion'"),
        ({"question": "Hi"}, "no column `prompt` or `messages`", "it has question. Rename"),
    ],
)
def test_rows_that_are_refused(row, reason, message):
    with pytest.raises(RowError, match=message) as error:
        check_row(row, "Row 7")
    assert error.value.reason == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3)
        | st.builds(said, st.sampled_from(ROLES), inner)
    ),
    max_leaves=8,
)


@given(json_values)
def test_whatever_passes_is_text_or_messages_with_text_that_ask(prompt):
    try:
        found = read_prompt(prompt, "prompt", "Row 0")
    except RowError:
        return
    assert read_prompt(found, "prompt", "Row 0") is found
    if isinstance(found, str):
        assert found is prompt
        assert found.strip()
        return
    assert all(m["role"] in ROLES and isinstance(m.get("content"), str | None) for m in found)
    assert found[-1]["content"].strip()
    assert found[-1]["role"] != "assistant"


@given(st.lists(st.text()))
def test_parts_are_joined(texts):
    assert flat_parts(parts(*texts)) == "".join(texts)
    assert flat_parts([*parts(*texts), {"type": "image"}]) is None


# Datasets


def stream_of(dataset):
    return dataset.to_iterable_dataset()


@pytest.mark.parametrize("shape", [lambda d: d, stream_of], ids=["table", "stream"])
@pytest.mark.parametrize(
    "messages",
    [
        lambda role, text: said(role, text),
        lambda role, text: said(role, parts(text)),
        lambda role, text: {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text},
    ],
    ids=["messages", "parts", "ShareGPT"],
)
def test_conversations_of_a_dataset(messages, shape):
    # long enough for `datasets` to write twice, and without an answer in all that is written first
    turns = [[messages("user", f"q{i}"), *([messages("assistant", "a")] if i > 1500 else [])] for i in range(1600)]
    dataset = Dataset.from_dict({"messages": turns, "day": ["2024-05-01"] * 1600})
    found = with_prompts(shape(dataset))
    assert set(found.column_names) == {"prompt", "completion", "day"}
    rows = list(found)
    assert rows[0] == {"prompt": [said("user", "q0")], "completion": None, "day": "2024-05-01"}
    assert rows[-1]["completion"] == [said("assistant", "a")]


def test_a_dataset_in_which_nothing_changes_is_passed_through():
    for rows in ({"prompt": ["a", "b"]}, {"prompt": [[USER]], "completion": [[ANSWER]]}, {"question": ["a"]}):
        dataset = Dataset.from_dict(rows)
        assert with_prompts(dataset) is dataset
    assert with_prompts(None) is None


@pytest.mark.parametrize("split", [None, "train"])
def test_the_bad_row_of_a_table_is_named_at_once(split):
    dataset = Dataset.from_dict({"prompt": ["a", "b", ""]})
    with pytest.raises(RowError, match="Row 2 of the training dataset has the prompt ''"):
        with_prompts(DatasetDict({split: dataset}) if split else dataset, "the training dataset")


def test_the_bad_row_of_a_stream_is_named_when_it_is_read():
    stream = with_prompts(Dataset.from_list([{"prompt": t} for t in ("a", "b", "")]).to_iterable_dataset(), "it")
    reader = iter(stream)
    assert [next(reader), next(reader)] == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(RowError, match="Row 2 of it has the prompt ''"):
        next(reader)


def test_plain_grpo_takes_what_trl_takes():
    """Without a teacher rows are TRL's to judge: images in a prompt are no error there."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": parts}]]})
    assert with_prompts(dataset, check=False) is dataset
    with pytest.raises(ValueError, match="image"):
        with_prompts(dataset)
    conversations = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    assert with_prompts(conversations, check=False).column_names == ["prompt", "completion"]

"""What an answer of the rewriter is taken for: a rewrite, or a failure with its reason."""

from __future__ import annotations

import pytest

from trl_distill.synthetic import Completion, Refusal
from trl_distill.synthetic.stages.operations import BUILT_IN, Operation, load_operations


PARENT = "Name three rivers in Europe and say how long they are."


(DEEPER,) = load_operations(["deeper"])


def read(text, parent=PARENT, reason="stop", continues=False, operation=DEEPER):
    return operation.read([Completion(text, reason)], parent, continues)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (PARENT, "equal to the parent"),
        ("name three rivers in Europe, and say how long they are", "equal to the parent"),
        ("Name three big rivers in Europe and say how long they are.", "nearly equal to the parent"),
        ("", "empty"),
        (" \n?!", "empty"),
        ("<think>a harder one", "empty"),
        ("Explain why the given prompt asks about rivers.", "the instruction leaked"),
        ("Here it is. #Rewritten Prompt#: Compare rivers.", "the instruction leaked"),
        ("#The Rewritten: compare rivers", "the instruction leaked"),
        (
            "A question that needs more knowledge or several steps of reasoning instead of one: rivers",
            "the instruction leaked",
        ),
        ("I'm sorry, but rivers are beyond me.", "unanswerable: an apology"),
        ("As an AI, I have no rivers.", "unanswerable: an apology"),
        ("Could you please provide the original text?", "unanswerable: asks for the prompt"),
        ("Please tell me which rivers, so that I can rewrite it.", "unanswerable: asks for the prompt"),
        ("Compare the Rhine and [insert another river].", "unanswerable: a placeholder"),
        ("Which rivers are on the attached table?", "unanswerable: speaks of something that is not given"),
        ("Sort the rivers in the table above by length.", "unanswerable: speaks of something that is not given"),
        ("Say how long these rivers are:", "unanswerable: speaks of something that is not given"),
    ],
)
def test_failures(text, fault):
    assert read(text)[1] == fault


@pytest.mark.parametrize(
    "text",
    [
        "Name three rivers in Europe, say how long they are, and explain which of them freeze in winter.",
        "Please provide the code for a function that sorts rivers by length.",
        'Translate the following sentence: "The Rhine is long."',
        "Which countries does the Danube cross, and what did that mean for trade in Roman times?",
    ],
)
def test_rewrites_that_can_be_used(text):
    assert read(text) == (text, None)


def test_other_numbers_ask_something_else():
    assert read("What is 30 + 41 if you add slowly?", "What is 31 + 41 if you add slowly?")[1] is None


def test_what_the_prompt_says_itself_is_no_failure_of_the_rewrite():
    parent = "Summarise the attached article. I'm sorry for the given prompt"
    assert read("List all claims of the attached article, with the given prompt in mind.", parent)[1] is None


def test_cut_and_refused():
    assert read("Name three rivers and then", reason="length")[1] == "cut off at the length limit"
    assert read("Name", reason="content_filter")[1] == "ended by 'content_filter'"
    assert DEEPER.read(Refusal("refused by x", "400"), PARENT, False) == ("", "refused by x")


def test_label_quotes_and_thoughts_are_taken_off():
    for text in (
        "#Rewritten Prompt#:\nWhy do rivers bend?",
        '"Why do rivers bend?"',
        "<think>#Given</think>\nWhy do rivers bend?",
    ):
        assert read(text) == ("Why do rivers bend?", None)


def test_a_model_that_continues_text_is_cut_where_it_goes_on():
    text = "Why do rivers bend?\n\n#Given Prompt#:\nand so"
    assert read(text, reason="length", continues=True) == ("Why do rivers bend?", None)
    assert read(text)[1] == "the instruction leaked"


def test_built_in_operations_and_those_of_users(tmp_path):
    assert [one.name for one in load_operations(None)] == list(BUILT_IN)
    assert load_operations("deeper") == [DEEPER]
    (tmp_path / "shout.txt").write_text('Write {"this"} in capitals: {prompt}')
    (shout,) = load_operations([str(tmp_path / "shout.txt")])
    assert shout == Operation("shout", 'Write {"this"} in capitals: {prompt}')
    assert shout.question("a {b}", "") == 'Write {"this"} in capitals: a {b}'
    assert shout.question("and c?", "user: a").startswith("The conversation before")
    (tmp_path / "deeper.txt").write_text("{prompt} x")
    (tmp_path / "none.txt").write_text("x")
    for names, message in (
        (["deeper", str(tmp_path / "deeper.txt")], "are called 'deeper'"),
        ([str(tmp_path / "none.txt")], "does not show the prompt"),
        (["wider"], "neither a built-in operation"),
    ):
        with pytest.raises(ValueError, match=message):
            load_operations(names)

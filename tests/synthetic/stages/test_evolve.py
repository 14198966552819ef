"""Prompts that are rewritten in rounds: lineage, planted failures, exact counts."""

from __future__ import annotations

import pytest

from trl_distill.synthetic import Completion, Refusal


def text_of(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def given(text):
    """The prompt in a request for a rewrite; `None` in others."""
    return text.split("#Given Prompt#:\n")[1].split("\n\n#")[0] if "#Given Prompt#:" in text else None


FAILURES = {
    "equal": lambda p: p,
    "leak": lambda p: f"{p}, like the given prompt says in other words",
    "regret": lambda p: "I'm sorry, I cannot help with that.",
    "cut": lambda p: Completion("and then", "length"),
    "void": lambda p: " ",
    "refuse": lambda p: Refusal("refused by the endpoint", "HTTP 400"),
}


def rewriter(prompt, seed, model):
    parent = given(text_of(prompt))
    if parent is None:
        return f"{model} answers at length: {text_of(prompt)}"
    kind = parent.split()[0]
    if kind in FAILURES:
        return FAILURES[kind](parent)
    if kind == "same":
        return "common question that two prompts lead to"
    if kind == "once" and "harder" in parent:
        return parent
    return f"{parent} and harder by {len(parent)} letters of it"


def stages(counts):
    return {stage["stage"]: stage for stage in counts["stages"]}


PLANTED = ["good one", *(f"{kind} two" for kind in FAILURES), "same three", "same four", "once five"]


@pytest.mark.parametrize("chat", [False, True])
def test_planted_failures_are_dropped_and_counted(bench, chat):
    bench.prompts([{"prompt": [{"role": "user", "content": p}] if chat else p, "answer": "x"} for p in PLANTED])
    bench.teach(rewriter)
    counts = bench.run(evolve=2, near_duplicates=0)
    found = stages(counts)
    reasons = {
        "equal to the parent": 1,
        "the instruction leaked": 1,
        "unanswerable: an apology": 1,
        "cut off at the length limit": 1,
        "empty": 1,
        "refused by the endpoint": 1,
    }
    assert found["evolve, round 1"]["dropped"] == reasons
    assert found["evolve, round 1"]["kept"] == 4
    assert found["evolve, round 2"]["dropped"] == {**reasons, "equal to the parent": 2}
    assert found["keep rewrites"]["in"] == len(PLANTED) + 4 + 3
    # both "same" prompts lead to one question, and their second round from it to another
    assert found["keep rewrites"]["dropped"] == {"equal to an earlier prompt": 2}
    rows = {text_of(row["prompt"]): row for row in bench.rows()}
    assert len(rows) == len(PLANTED) + 5
    assert all(rows[p]["evolved_from"] is None and rows[p]["answer"] == "x" for p in PLANTED)
    once, twice = "good one and harder by 8 letters of it", "good one and harder by 8 letters of it and harder by"
    assert rows[once]["evolved_from"] == "good one"
    assert rows[once]["answer"] is None
    assert len(rows[once]["evolution"]) == 1
    (second,) = (row for text, row in rows.items() if text.startswith(twice))
    assert second["evolution"][:1] == rows[once]["evolution"]
    assert len(second["evolution"]) == 2
    assert [skip["where"] for skip in bench.skipped()] == ["prompt 6"] * 2
    assert {path.name for path in bench.out.iterdir()} == {"README.md", "counts.json", "data", "skipped.jsonl"}


def test_a_failed_prompt_goes_on_from_its_parent(bench):
    bench.prompts([{"prompt": f"river {i}"} for i in range(8)])
    bench.teach(
        lambda p, s, m: f"answer {p}" if given(p) is None else given(p) + " why so" * (s % 2 * 3) + " " * (s % 2)
    )
    bench.run(evolve=4, evolve_operations=["deeper"], near_duplicates=0, max_repetition=1.0)
    for row in bench.rows():
        assert row["prompt"].count("why so") == 3 * len(row["evolution"] or [])


def test_only_the_last_rewrites(bench):
    bench.prompts([{"prompt": p} for p in PLANTED])
    bench.teach(rewriter)
    counts = bench.run(evolve=2, evolve_keep="last", near_duplicates=0)
    assert stages(counts)["keep the last rewrites"]["dropped"] == {
        "no round could rewrite it": 6,
        "equal to an earlier prompt": 1,
    }
    assert [(row["evolved_from"], len(row["evolution"])) for row in bench.rows()] == [
        ("good one", 2),
        ("same three", 2),
        ("once five", 1),
    ]


def test_the_rewriter_may_be_another_model_and_check_its_work(bench):
    bench.prompts([{"prompt": f"river {i}"} for i in range(6)])

    def answer(prompt, seed, model):
        if "Verdict:" in prompt:
            assert model == "boss"
            return "hm. Verdict: no" if "river 3" in prompt else "hm" if "river 4" in prompt else 'Verdict: "yes".'
        if given(prompt) is not None:
            assert model == "boss"
            return f"{given(prompt)}, and which towns stand beside it in which order"
        assert model == "someone"
        return f"answer {prompt}"

    bench.teach(answer)
    counts = bench.run(evolve=1, evolve_model="boss", evolve_check=True, near_duplicates=0)
    assert stages(counts)["evolve, round 1"]["dropped"] == {
        "unanswerable: the rewriter's own verdict": 1,
        "check without a verdict": 1,
    }
    assert len(bench.rows()) == 10


def test_only_the_last_turn_is_rewritten_and_the_others_are_shown(bench):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Rome?"},
        {"role": "assistant", "content": "In Italy."},
        {"role": "user", "content": "And Bonn?"},
    ]
    bench.prompts([{"prompt": talk}])
    teachers = bench.teach(rewriter)
    bench.run(evolve=1)
    row = bench.rows()[1]
    assert row["prompt"][:3] == talk[:3]
    assert row["prompt"][3] == {"role": "user", "content": "And Bonn? and harder by 9 letters of it"}
    asked = teachers[0].asked[0][0]["content"]
    assert "user: Where is Rome?\nassistant: In Italy." in asked
    assert "Be brief" not in asked


def test_an_apology_in_answer_to_a_rewrite_is_dropped(bench):
    bench.prompts([{"prompt": "river one"}, {"prompt": "river two"}])
    bench.teach(lambda p, s, m: rewriter(p, s, m) if given(p) else "I'm sorry, I cannot say.")
    counts = bench.run(evolve=1, near_duplicates=0)
    assert stages(counts)["filter"]["dropped"] == {"apology in answer to a rewritten prompt": 2}


def test_rewrites_are_completed_by_the_teacher_of_their_original(bench):
    bench.prompts([{"prompt": f"river {i}", "teacher": "ab"[i % 2]} for i in range(4)])
    bench.teach(rewriter)
    bench.run(evolve=1, teacher_models={"a": "x", "b": "y"}, teacher_assignment="column", near_duplicates=0)
    rows = bench.rows()
    assert len(rows) == 8
    assert all(row["teacher"] == "ab"[int(row["prompt"].split()[1]) % 2] for row in rows)


def test_another_operation_under_the_same_name_is_another_setting(bench):
    bench.prompts([{"prompt": "river one"}])
    bench.teach(rewriter)
    own = bench.folder / "own.txt"
    own.write_text("Make it harder.\n#Given Prompt#:\n{prompt}\n\n#New#:")
    bench.run(evolve=1, evolve_operations=[str(own)])
    assert bench.rows()[1]["evolution"] == ["own"]
    own.write_text("Make it much harder.\n#Given Prompt#:\n{prompt}\n\n#New#:")
    with pytest.raises(ValueError, match="operations_digest"):
        bench.run(evolve=1, evolve_operations=[str(own)], overwrite=True)


def test_settings(bench):
    for settings, message in (
        ({"evolve": -1}, "number of rounds"),
        ({"evolve_model": "x"}, "Add `--evolve 1`"),
        ({"evolve": 1, "evolve_keep": "best"}, "'all', 'last'"),
        ({"evolve": 1, "evolve_operations": []}, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.config(**settings)

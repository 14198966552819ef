"""Completions that are criticised and rewritten: what takes their place, planted failures, pairs, exact counts."""

from __future__ import annotations

import pytest
from chat_server import ChatServer

from trl_distill.synthetic import Completion, Refusal
from trl_distill.synthetic.stages.principles import Principle, load_principles


def text_of(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


BAD_CRITIQUES = {"nocrit": Refusal("refused by the endpoint", "HTTP 400"), "cutcrit": Completion("it is", "length")}


BAD_REVISIONS = {
    "norev": Refusal("refused by the endpoint", "HTTP 400"),
    "cutrev": Completion("it was", "length"),
    "void": " ",
    "filtered": Completion("x", "content_filter"),
}


def teacher(prompt, seed, model):
    """A draft, a critique or a revision, by what is asked for; the prompt's first word plants a failure."""
    text = text_of(prompt)
    kind = text.split()[0]
    draft = f"draft by {seed % 9973} about {kind} of many words"
    if "Rewrite" in text:
        if kind == "same":
            return f"<<{text.split('<<')[1].split('>>')[0]}>> "
        return BAD_REVISIONS.get(kind, f"Here is the revised answer:\n\nbetter {model} words {seed % 9973} on {kind}")
    if "Identify" in text:
        return BAD_CRITIQUES.get(kind, f"weak: {kind}")
    if kind == "same":
        return f"<<{draft}>>"
    return Completion("", "stop") if kind == "mute" else draft


PLANTED = ["good one", *(f"{kind} two" for kind in (*BAD_CRITIQUES, *BAD_REVISIONS)), "mute three", "good four"]


@pytest.fixture
def principles(bench):
    path = bench.folder / "principles.txt"
    path.write_text("Be honest.\nBe brief.\n")
    return str(path)


def stages(counts):
    return {stage["stage"]: stage for stage in counts["stages"]}


REASONS = {
    "draft stays: critique: refused by the endpoint": 1,
    "draft stays: critique: cut off at the length limit": 1,
    "draft stays: revision: refused by the endpoint": 1,
    "draft stays: revision: cut off at the length limit": 1,
    "draft stays: revision: empty": 1,
    "draft stays: revision: ended by 'content_filter'": 1,
    "draft stays: draft: empty": 1,
}


@pytest.mark.parametrize("chat", [False, True])
def test_revisions_take_the_places_of_completions_and_failures_are_counted(bench, principles, chat):
    bench.prompts([{"prompt": [{"role": "user", "content": p}] if chat else p} for p in PLANTED])
    bench.teach(teacher)
    counts = bench.run(revise=principles, keep_drafts=True, near_duplicates=0)
    revised = stages(counts)["revise, round 1"]
    assert (revised["in"], revised["kept"], revised["dropped"]) == (9, 2, REASONS)
    rows = {text_of(row["prompt"]): row for row in bench.rows()}
    assert set(rows) == {p for p in PLANTED if p != "mute three"}
    for name, row in rows.items():
        completion = row["completion"] if not chat else row["completion"][0]["content"]
        if name.startswith("good"):
            assert completion.startswith("better someone words")
            assert (row["draft"] if not chat else row["draft"][0]["content"]).startswith("draft by")
            assert row["critique"] == ["weak: good"]
            assert row["principle"][0] in ("Be honest.", "Be brief.")
        else:
            assert completion.startswith("draft by")
            assert (row["draft"], row["critique"], row["principle"]) == (None, [], [])


def test_a_chat_model_is_asked_in_two_turns(bench, principles):
    bench.prompts([{"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "good one"}]}])
    teachers = bench.teach(teacher)
    bench.run(revise=principles)
    critique, revision = teachers[-1].asked
    assert [m["role"] for m in critique] == ["system", "user", "assistant", "user"]
    assert critique[2]["content"].startswith("draft by")
    assert critique[3]["content"].startswith("Identify specific ways")
    assert revision[:4] == critique
    assert revision[4] == {"role": "assistant", "content": "weak: be" if "weak: be" in str(revision) else "weak: Be"}
    assert revision[5]["content"].startswith("Rewrite the answer so that it follows this principle: Be")


def test_rounds_and_another_model(bench, principles):
    bench.prompts([{"prompt": f"good {i}"} for i in range(6)])
    asked = []

    def answer(prompt, seed, model):
        asked.append((model, "Identify" in prompt))
        return teacher(prompt, seed, model)

    bench.teach(answer)
    names = {"a": "x", "b": "y"}
    counts = bench.run(
        **{"revise": principles, "revise_rounds": 2, "revise_model": "editor", "keep_drafts": True},
        **{"teacher_models": names, "completions_per_prompt": 2, "near_duplicates": 0},
    )
    assert [stages(counts)[f"revise, round {i}"]["kept"] for i in (1, 2)] == [24, 24]
    assert {model for model, is_critique in asked if is_critique} == {"editor"}
    rows = bench.rows()
    assert {row["teacher"] for row in rows} == {"a", "b"}
    assert all(len(row["critique"]) == len(row["principle"]) == 2 for row in rows)
    assert all(row["draft"].startswith("draft") and row["completion"].startswith("better editor") for row in rows)


def test_other_principles_make_other_revisions_of_the_same_drafts(bench, principles):
    bench.prompts([{"prompt": "good one"}, {"prompt": "good two"}])
    bench.teach(teacher)
    bench.run(revise=principles, keep_drafts=True)
    first = bench.rows()
    teachers = bench.teach(teacher)
    (bench.folder / "principles.txt").write_text("Be clear.")
    bench.run(revise=principles, keep_drafts=True, overwrite=True)
    assert [row["draft"] for row in bench.rows()] == [row["draft"] for row in first]
    assert [row["principle"] for row in bench.rows()] == [["Be clear."]] * 2
    assert all("Identify" in prompt for one in teachers for prompt in one.asked)


def test_pairs_without_a_verifier(bench, principles):
    bench.prompts([{"prompt": p} for p in [*PLANTED, "same five"]])
    bench.teach(teacher)
    counts = bench.run(revise=principles, pairs=True, keep_drafts=True, near_duplicates=0)
    assert stages(counts)["revise, round 1"]["dropped"] == {**REASONS, "draft stays: revision: equal to the draft": 1}
    assert stages(counts)["pair"]["dropped"] == {"not revised": 7}
    rows = bench.rows()
    assert [row["prompt"] for row in rows] == ["good one", "good four"]
    assert all(row["chosen"].startswith("better") and row["rejected"].startswith("draft") for row in rows)
    assert "chosen_score" not in rows[0]
    assert "draft" not in rows[0]
    assert rows[0]["critique"] == ["weak: good"]


VERIFIER = """
def right(completions, prompts, **kwargs):
    def score(c, p):
        revised = c.startswith("better")
        if p.startswith("none") and not revised:
            return None
        return {"up": revised, "down": not revised, "equal": True, "none": True}[p.split()[0]] * 1.0
    return [score(c, p) for c, p in zip(completions, prompts, strict=True)]
"""


def test_pairs_with_a_verifier_where_the_revision_scores_higher(bench, principles, reward):
    reward(VERIFIER)
    bench.prompts([{"prompt": f"{kind} {i}"} for kind in ("up", "down", "equal", "none") for i in range(2)])
    bench.teach(teacher)
    counts = bench.run(revise=principles, pairs=True, reward_funcs=["my_verifier.right"], near_duplicates=0)
    assert stages(counts)["pair"]["dropped"] == {
        "revision scores no higher than the draft": 4,
        "draft without a score": 2,
    }
    rows = bench.rows()
    assert [row["prompt"] for row in rows] == ["up 0", "up 1"]
    assert {(row["chosen_score"], row["rejected_score"]) for row in rows} == {(1.0, 0.0)}


def test_without_pairs_the_revisions_are_verified(bench, principles, reward):
    reward(VERIFIER)
    bench.prompts([{"prompt": "up 0"}, {"prompt": "down 0"}])
    bench.teach(teacher)
    bench.run(revise=principles, reward_funcs=["my_verifier.right"], keep="correct")
    assert [row["prompt"] for row in bench.rows()] == ["up 0"]


def test_a_draft_that_was_cut_off_may_become_a_whole_revision(bench, principles):
    bench.prompts([{"prompt": "good one"}])

    def answer(prompt, seed, model):
        return teacher(prompt, seed, model) if "Identify" in prompt else Completion("a draft that", "length")

    bench.teach(answer)
    bench.run(revise=principles)
    assert bench.rows()[0]["completion"].startswith("better")


def test_a_served_teacher(bench, principles):
    bench.prompts([{"prompt": [{"role": "user", "content": f"river {i}"}]} for i in range(3)])

    def answer(text, seed):
        return "wrong length" if "Identify" in text else "all right" if "Rewrite" in text else f"so {text}"

    with ChatServer(answer) as server:
        bench.run(revise=principles, teacher_model_name_or_path=f"{server.url}#m", keep_drafts=True)
    assert [row["completion"][0]["content"] for row in bench.rows()] == ["all right"] * 3
    assert [row["draft"][0]["content"] for row in bench.rows()] == [f"so river {i}" for i in range(3)]


def test_principles_in_files(tmp_path):
    def load(text):
        (tmp_path / "p").write_text(text)
        return load_principles(str(tmp_path / "p"))

    assert [one.text for one in load("# mine\nBe kind.\n# more\nBe brief.\n")] == ["Be kind.", "Be brief."]
    assert [one.text for one in load("Be kind\nto all.\n\n\nBe brief.")] == ["Be kind to all.", "Be brief."]
    pair = Principle("What is rude?", "What is rude?", "Be polite.")
    assert load("critique: What is rude?\nRevision: Be polite.") == [pair]
    assert [one.text for one in load("Be kind.\ncritique: What is rude?\nrevision: Be polite.\nBe brief.")] == [
        *("Be kind.", "What is rude?", "Be brief.")
    ]
    assert len(load_principles("default")) == 7
    for text, message in (("# nothing\n\n", "no principle"), ("critique: What?\n\nBe kind.", "not whole")):
        with pytest.raises(ValueError, match=message):
            load(text)
    with pytest.raises(ValueError, match="not a file"):
        load_principles(str(tmp_path / "q"))


def test_settings(bench):
    for settings, message in (
        ({"revise_model": "x"}, "nothing is revised"),
        ({"revise": "default", "revise_rounds": 0}, "at least 1"),
        ({"revise": "default", "pairs": True, "keep": "correct"}, "needs scores"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.config(**settings)

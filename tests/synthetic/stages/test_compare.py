"""A judge that compares: what counts as a verdict, its biases, and runs that are interrupted."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from chat_server import ChatServer

from trl_distill import TeacherUnavailable
from trl_distill.synthetic import Completion
from trl_distill.synthetic.stages.compare import Comparison, Pair, PairJudge
from trl_distill.synthetic.stages.judge import LocalJudging
from trl_distill.synthetic.stages.verdict import read_choice


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("Verdict: 1", 1),
        ("I like it.\n**Verdict:** 2.", -1),
        ("Verdict: tie", 0),
        ("Verdict: [[1]]", 1),
        ("Verdict: Answer 2", -1),
        ('{"verdict": "tie"}', 0),
        ('{"verdict": 2}', -1),
        ("Verdict: 2 at first sight.\n\nBut no: it is wrong.\nVerdict: 1", 1),
        ("Verdict: 2\nVerdict: 1", None),  # a list of what may be written
        ("<think>Verdict: 1</think>Verdict: 2", -1),
        ("Verdict: 1, since it is complete.", 1),
        ("Verdict: 3", None),
        ("Verdict: 1.5", None),
        ("Verdict: 1 or 2", None),
        ("Verdict: 1 or Verdict: 2", None),
        ("Verdict: 1, but both are good.", None),
        ("Verdict: 1/2", None),
        ("Verdict: 10", None),
        ("Verdict: 1\nWait, no.", None),
        ("Verdict: tiebreak", None),
        ("The better one is 1", None),
        ("Score: 1", None),
        ("<think>Verdict: 1", None),
    ],
)
def test_a_choice_is_read_exactly_or_not_at_all(said, choice):
    assert read_choice(said) == choice


def test_an_instruction_that_is_repeated_is_no_choice():
    question = 'Think, then end with one line: "Verdict: 1" if answer 1 is better.'
    assert read_choice('I should end with one line: "Verdict: 1"', question) is None


def test_outcomes_of_both_orders():
    assert [Comparison(a, b).outcome for a, b in ((1, -1), (-1, 1), (0, 0))] == [1.0, 0.0, 0.5]
    for there, back in ((1, 1), (-1, -1), (1, 0), (0, -1)):
        assert (Comparison(there, back).outcome, Comparison(there, back).contradicts) == (0.5, True)


class FunctionTeacher:
    """A source made of a function; notes what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def complete(self, prompts, seed):
        self.asked += prompts
        return [[Completion(self.answer(prompt, 0), "stop")] for prompt in prompts]

    def close(self):
        pass


def answers_in(question):
    return [re.findall(rf"<answer_{i}>\n(.*?)\n</answer_{i}>", question, re.DOTALL)[0] for i in (1, 2)]


def by_number(question, seed=0):
    """Prefers the higher number at the end; with "odd" it takes the first place, with "mute" it says nothing."""
    first, second = answers_in(question)
    if "mute" in first + second:
        return "Both have something."
    if "odd" in first + second:
        return "Verdict: 1"
    a, b = (int(text.split()[-1]) for text in (first, second))
    return f"I compared them.\nVerdict: {'tie' if a == b else 1 if a > b else 2}"


TEXTS = {  # what the two teachers say to each prompt, four answers
    "plain": (["x 1", "x 2"], ["x 3", "x 4"]),
    "tied": (["x 1", "y 1"], ["z 1", "w 1"]),
    "equal": (["x 1", "x 1"], ["x 2", "x 1"]),
    "odd": (["odd 1", "x 2"], ["x 3", "x 4"]),
    "mute": (["mute 1", "x 2"], ["x 3", "x 4"]),
}


@pytest.fixture
def compared(bench):
    bench.prompts([{"prompt": name} for name in TEXTS])
    calls: dict = {}

    def teacher(prompt, seed, model):
        calls.setdefault((prompt, model), []).append(seed)
        return TEXTS[prompt]["ab".index(model)][(len(calls[prompt, model]) - 1) % 2]

    bench.teach(teacher)
    with ChatServer(by_number) as server:
        bench.server = server
        bench.settings = {
            "teacher_models": {"A": "a", "B": "b"},
            "completions_per_prompt": 2,
            "judge": f"{server.url}#m",
            "judge_mode": "pairwise",
            "near_duplicates": 0,
            "chunk_size": 2,
        }
        yield bench


def test_comparisons_are_counted_and_become_scores(compared):
    counts = compared.run(**compared.settings, keep="best")
    stages = {stage["stage"]: stage for stage in counts["stages"]}
    assert stages["compare"] == {
        "stage": "compare",
        "unit": "comparisons",
        "in": 30,
        "kept": 27,
        "dropped": {"judge gave no verdict": 3},
    }
    assert stages["verify"]["dropped"] == {"no comparison has a verdict": 1}
    found = counts["judge"]["comparisons"]
    assert {name: found[name] for name in ("comparisons", "decided", "ties", "equal_texts", "contradictions")} == {
        "comparisons": 30,
        "decided": 6 + 3 + 3 + 3,
        "ties": 6,
        "equal_texts": 3,
        "contradictions": 3,
    }
    assert found["follows_place"]["value"] == pytest.approx(3 / 24)
    assert len(compared.server.asked) == 2 * (30 - 3)
    best = {row["prompt"]: row["completion"] for row in compared.rows()}
    assert best == {"plain": "x 4", "tied": "x 1", "equal": "x 2", "odd": "x 4", "mute": "x 4"}
    assert {skip["where"] for skip in compared.skipped() if skip["stage"] == "compare"} == {
        "prompt 4, A 0 and A 1",
        "prompt 4, A 0 and B 0",
        "prompt 4, A 0 and B 1",
    }
    assert "## Judge" in (compared.out / "README.md").read_text()


def test_pairs_of_comparisons(compared):
    compared.run(**compared.settings, pairs=True)
    rows = {row["prompt"]: row for row in compared.rows()}
    assert (rows["plain"]["chosen"], rows["plain"]["rejected"]) == ("x 4", "x 1")
    assert rows["plain"]["chosen_score"] == pytest.approx(-rows["plain"]["rejected_score"])
    assert "tied" not in rows


def test_a_part_of_the_pairs_is_compared(compared):
    counts = compared.run(**compared.settings, judge_comparisons=4)
    assert counts["judge"]["comparisons"]["comparisons"] == 20


def test_comparisons_go_on_where_they_were_interrupted(compared):
    whole = compared.run(**compared.settings, keep="best")
    rows, asked = compared.rows(), len(compared.server.asked)
    (folder,) = compared.out.with_name("out.work").glob("comparisons-*")
    (folder / "0" / "000001.jsonl").unlink()
    for path in compared.out.with_name("out.work").glob("scores-*/*/000001.jsonl"):
        path.unlink()
    again = compared.run(**compared.settings, keep="best", overwrite=True, max_characters=999)
    assert (again["judge"], compared.rows()) == (whole["judge"], rows)
    assert 0 < len(compared.server.asked) - asked < asked


@pytest.mark.parametrize("answered", [0, 9, 31])
def test_a_judge_that_goes_away_is_asked_the_rest_later(compared, answered):
    whole = compared.run(**compared.settings, keep="best")
    rows = compared.rows()
    shutil.rmtree(compared.out)
    for folder in compared.out.with_name("out.work").glob("*-*"):
        shutil.rmtree(folder)
    start = len(compared.server.asked)
    compared.server.refuse = lambda text: 503 if len(compared.server.asked) - start > answered else None
    with pytest.raises(TeacherUnavailable):
        compared.run(**compared.settings, keep="best", retries=0, concurrency=1)
    compared.server.refuse = lambda text: None
    again = compared.run(**compared.settings, keep="best")
    assert (again["judge"], again["stages"], compared.rows()) == (whole["judge"], whole["stages"], rows)


def test_a_local_judge_is_loaded_when_it_is_asked_and_can_be_given_back():
    loaded: list[FunctionTeacher] = []

    def load():
        loaded.append(FunctionTeacher(lambda prompt, seed: by_number(prompt[0]["content"])))
        return loaded[-1]

    judge = PairJudge(LocalJudging("folder", load))
    assert not loaded
    assert not judge.remote
    pairs = [Pair("q", "x 1", "x 2", {}), Pair("q", "x 3", "x 3", {})]
    assert [one.outcome for one in judge.compare(pairs)] == [0.0, 0.5]
    judge.close()
    assert judge.compare(pairs[:1])[0].outcome == 0.0
    assert [len(one.asked) for one in loaded] == [2, 2]


def test_a_local_judge_that_is_not_there_is_named_early(bench):
    bench.prompts([{"prompt": "a"}])
    bench.teach(lambda prompt, seed, model: "b")
    with pytest.raises(ValueError, match="'nowhere' could not be found"):
        bench.run(judge="nowhere")


def test_aspects_are_columns_and_a_weighted_score(bench):
    said = {"kind": {"helpfulness": 5, "honesty": 2}, "rude": {"helpfulness": 1, "honesty": 5}}

    def judge(question, seed):
        aspect = "helpfulness" if "its\nhelpfulness" in question else "honesty"
        text = re.findall(r"<answer>\n(.*?)\n</answer>", question)[0]
        return f"Score: {said[text][aspect] if text in said else 9}"

    bench.prompts([{"prompt": name} for name in ("kind", "rude", "mad")])
    bench.teach(lambda prompt, seed, model: prompt)
    with ChatServer(judge) as server:
        settings = {"judge": f"{server.url}#m", "judge_mode": "aspects", "judge_aspects": "helpfulness=3, honesty"}
        counts = bench.run(**settings)
    rows = {row["prompt"]: row for row in bench.rows()}
    assert rows["kind"]["score"] == pytest.approx((3 * 5 + 2) / 4)
    assert (rows["rude"]["score_helpfulness"], rows["rude"]["score_honesty"]) == (1.0, 5.0)
    (verify,) = [stage for stage in counts["stages"] if stage["stage"] == "verify"]
    assert verify["dropped"] == {"judge gave no score": 1}  # 9 is not on the scale


GOOD = {"judge": "http://h#m", "completions_per_prompt": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_mode": "pairwise", "keep": "correct"}, "relative"),
        ({"judge_mode": "pairwise", "keep": "correct", "pairs": True}, "relative"),
        ({"judge_mode": "pairwise", "completions_per_prompt": 1}, "compares completions of a prompt"),
        ({"judge_mode": "pairwise", "judge_comparisons": 2}, "at least 3"),
        ({"judge_comparisons": 9}, 'only `judge_mode="pairwise"`'),
        ({"judge_mode": "best"}, "is not known"),
        ({"judge_mode": "aspects"}, "belong together"),
        ({"judge_aspects": "a"}, "belong together"),
        ({"judge_mode": "aspects", "judge_aspects": "a=2, a"}, "there twice"),
        ({"judge_mode": "aspects", "judge_aspects": "a=-1"}, "above 0"),
        ({"judge_mode": "aspects", "judge_aspects": "a,,b"}, "no name"),
        ({"judge_mode": "aspects", "judge_aspects": "a", "keep": "correct"}, "from 1 to 5"),
        ({"judge": None, "judge_mode": "pairwise"}, "no `judge`"),
        ({"judge": None, "judge_check": "x"}, "no `judge`"),
        ({"reward_funcs": ["f"]}, "judge_check"),
    ],
)
def test_settings_without_a_meaning(bench, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.config(**{**GOOD, **changes})


def verdicts(rule):
    """A judge that compares by `rule(first, second)`."""
    return lambda question, seed: f"Verdict: {rule(*answers_in(question))}"


def labelled(bench, rows):
    path = bench.folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench.prompts([{"prompt": "a"}])
    bench.teach(lambda prompt, seed, model: f"{seed}")
    return {"judge_check": str(path), "completions_per_prompt": 2}


PAIRS = [
    {"prompt": f"q{i}", "chosen": "good" + "!" * (9 if i < 6 else 0), "rejected": "bad" + "!" * (0 if i < 6 else 9)}
    for i in range(10)
]


@pytest.mark.parametrize(
    ("rule", "accuracy", "follows", "longer"),
    [
        (lambda a, b: 1 if "good" in a else 2, 1.0, 0.0, 0.6),
        (lambda a, b: 1, 0.5, 1.0, None),  # always the first place
        (lambda a, b: 1 if len(a) > len(b) else 2, 0.6, 0.0, 1.0),  # always the longer one
        (lambda a, b: "tie", 0.5, 0.0, None),
    ],
    ids=["good", "first place", "longer", "ties"],
)
def test_planted_biases_of_a_judge_that_compares_are_measured(bench, rule, accuracy, follows, longer):
    settings = labelled(bench, PAIRS)
    with ChatServer(verdicts(rule)) as server:
        found = bench.run(**settings, judge=f"{server.url}#m", judge_mode="pairwise")["judge"]["check"]
    assert found["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["accuracy"]["low"] < found["accuracy"]["value"] or accuracy == 0
    assert found["follows_place"]["value"] == pytest.approx(follows)
    assert found["longer_wins"]["value"] == (None if longer is None else pytest.approx(longer))
    assert found["longer_is_better_in_labels"]["value"] == pytest.approx(0.6)
    assert (found["pairs"], found["contradictions"]) == (10, 10 if follows else 0)


def test_a_judge_that_scores_is_checked_beside_reward_functions(bench, reward):
    reward(
        "def right(completions, answer, **kwargs):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    rows = [
        {"prompt": "q1", "completion": "yes", "label": True, "answer": "yes"},
        {"prompt": "q1", "completion": "no no no", "label": False, "answer": "yes"},
        {"prompt": "q2", "completion": "mute", "label": False, "answer": "no"},
        {"prompt": "q3", "completion": "no", "label": True, "answer": "no"},
    ]
    settings = labelled(bench, rows)
    bench.prompts([{"prompt": "a", "answer": "b"}])

    def judge(question, seed):  # by length: right from five characters on
        text = re.findall(r"<answer>\n(.*?)\n</answer>", question)[0]
        return "Hm." if text == "mute" else f"Score: {float(len(text) > 4)}"

    with ChatServer(judge) as server:
        counts = bench.run(**settings, judge=f"{server.url}#m", reward_funcs=["my_verifier.right"])
        asked = len(server.asked)
        bench.run(**settings, judge=f"{server.url}#m", reward_funcs=["my_verifier.right"], overwrite=True, seed=0)
        assert len(server.asked) == asked
    found = counts["judge"]["check"]
    assert (found["rows"], found["pairs"], found["scores"]) == (4, 1, 3)
    assert found["no_score"] == {"judge gave no score": 1}
    assert found["label_accuracy"]["value"] == 0.0
    assert found["label_accuracy"]["of"] == 3
    assert found["verifier_agreement"]["value"] == 0.0
    assert found["verifier_agreement_on_pairs"]["value"] == 0.0
    assert found["length_correlation"] > 0.8 > 0 > found["length_correlation_of_labels"]
    assert [skip["where"] for skip in bench.skipped() if skip["stage"] == "judge check"] == ["line 3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "line 1: no `prompt`"),
        ({"prompt": "q", "completion": "a"}, "neither `chosen`"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "true or false"),
        ({"prompt": "q", "completion": "a", "label": 1}, "no pairs to compare"),
    ],
)
def test_rows_without_labels_are_refused_before_anything_is_asked(bench, row, message):
    settings = labelled(bench, [row])
    with pytest.raises(ValueError, match=message):
        bench.run(**settings, judge="http://127.0.0.1:9#m", judge_mode="pairwise")

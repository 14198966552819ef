"""All stages in one run against a scripted endpoint: planted cases with exact counts, and kills at random moments."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer
from processes import started, succeeds


BENCHMARK = "a baker sells forty loaves on monday and twice as many on tuesday how many loaves are that"


PLANTED = {  # the first word of a prompt, which its rewrites keep, and how many there are
    **{"plain": 6, "leak": 2, "regret": 2, "attached": 1, "equal": 1, "doubtful": 1, "forbidden": 1, "drift": 1},
    **{"tie": 2, "odd": 2, "mute": 1, "same": 1, "silent": 1, "half": 1, "long": 1, "stern": 1},
}


REWRITES = {  # what goes wrong with the rewrite
    "leak": "{} as the rewritten prompt says in more words",
    "regret": "I'm sorry, but I cannot help with this at all.",
    "attached": "{} and read the attached table to the very end",
    "equal": "{}",
    "drift": "{}. " + BENCHMARK,
}


LABELLED = [("word 9", "word 2"), ("word 7", "word 3"), ("word 1", "word 5"), ("tie 1", "tie 2"), ("odd 1", "odd 2")]


class Script(ChatServer):
    """Answers each request of the pipeline by the kind of prompt that it is about; sees the model and all messages."""

    def __init__(self, seconds: float = 0.0):
        super().__init__(self.say)
        self.seconds = seconds
        self.refuse, self.alter = self.is_refused, self.cut

    def respond(self, path, body):
        time.sleep(self.seconds)
        said = "\n\n".join(message["content"] for message in body["messages"])
        return super().respond(path, {**body, "messages": [{"role": "user", "content": f"{body['model']}| {said}"}]})

    @staticmethod
    def is_refused(text):
        refused = text.startswith("b| stern") or "#Given Prompt#:\nforbidden" in text
        return 400 if refused else None

    @staticmethod
    def cut(text, answer):
        for choice in answer["choices"]:
            if choice["message"]["content"].endswith("CUT"):
                choice["finish_reason"] = "length"
        return answer

    @staticmethod
    def say(text, seed):
        model, text = text.split("| ", 1)
        if "#Given Prompt#:" in text:
            parent = text.split("#Given Prompt#:\n")[1].split("\n\n#")[0]
            return REWRITES.get(parent.split()[0], "{} and then say why it is so").format(parent)
        if "that will be put to an assistant" in text:
            return f"Verdict: {'no' if 'doubtful' in text else 'yes'}"
        if "New task:" in text:
            return f"New task: plain and new question {seed}"
        if "<answer_1>" in text:
            return verdict(text)
        kind = text.split()[0]
        if "Rewrite the answer" in text:
            draft = text.split("\n\n")[1]
            if kind in ("same", "long"):
                return draft
            return f"{draft} made better" + (" and CUT" if kind == "half" else "")
        if "Identify" in text:
            return "" if kind == "silent" else "It could be better."
        return f"{kind} of {model} says {seed}" + (" CUT" if kind == "long" else "")


def verdict(question):
    """The answer with the higher number is better, but for the kinds that are planted."""
    answers = [re.findall(rf"<answer_{i}>\n(.*?)\n</answer_{i}>", question, re.DOTALL)[0] for i in (1, 2)]
    kind = answers[0].split()[0]
    if kind == "mute":
        return "Both are of interest."
    if kind in ("tie", "odd"):
        return "Verdict: tie" if kind == "tie" else "Verdict: 1"
    first, second = (int(re.findall(r"\d+", answer)[-1]) for answer in answers)
    return f"Verdict: {1 if first > second else 2}"


def write_inputs(folder):
    """Prompts of which one is contaminated, one repeated and one broken; the benchmark; and labelled pairs."""
    texts = [f"{kind} question {i} of them all" for kind, count in PLANTED.items() for i in range(count)]
    texts = [*texts[:9], f"Tell me: {BENCHMARK.upper()}?", *texts[9:], texts[0]]
    lines = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]) + "\n")
    (folder / "bench.jsonl").write_text(json.dumps({"question": BENCHMARK}) + "\n")
    rows = [{"prompt": "q" * (i + 1), "chosen": a, "rejected": b} for i, (a, b) in enumerate(LABELLED)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder, url):
    return {
        **{"dataset_name": f"{folder}/prompts.jsonl", "output_dir": f"{folder}/out", "chunk_size": 5},
        **{"teacher_models": json.dumps({"A": f"{url}#a", "B": f"{url}#b"}), "completions_per_prompt": 2},
        **{"new_prompts": 3, "evolve": 1, "evolve_operations": ["constraints"], "evolve_check": True},
        **{"revise": "default", "keep_drafts": True, "judge": f"{url}#judge", "judge_mode": "pairwise"},
        **{"judge_check": f"{folder}/labelled.jsonl", "keep": "best", "benchmarks": [f"{folder}/bench.jsonl"]},
        **{"near_duplicates": 0, "max_repetition": 1.0, "concurrency": 4, "retries": 0},
    }


STAGES = {  # what comes in, what is kept, and why the rest is not
    "read": (28, 27, {"broken JSON": 1}),
    "contamination": (27, 26, {"shares 13 words with a benchmark": 1}),
    "equal prompts": (26, 25, {"equal to an earlier prompt": 1}),
    "new prompts": (5, 3, {"more than asked for": 2}),
    "evolve, round 1": (
        28,
        19,
        {
            "the instruction leaked": 2,
            "unanswerable: an apology": 2,
            "unanswerable: speaks of something that is not given": 1,
            "unanswerable: the rewriter's own verdict": 1,
            "equal to the parent": 1,
            "refused by the endpoint": 1,
            "shares 13 words with a benchmark": 1,
        },
    ),
    "keep rewrites": (47, 47, {}),
    "ask the teachers": (94, 92, {"refused by the endpoint": 2}),
    "revise, round 1": (
        184,
        152,
        {
            "draft stays: critique: empty": 8,
            "draft stays: revision: cut off at the length limit": 16,
            "draft stays: revision: equal to the draft": 8,
        },
    ),
    "compare": (272, 260, {"judge gave no verdict": 12}),  # 6 of each prompt, 1 where a teacher refused
    "verify": (184, 176, {"no comparison has a verdict": 8}),
    "filter": (176, 168, {"cut off at the length limit": 8}),
    "keep best": (168, 43, {"not the best of its prompt": 125}),
    "duplicates": (43, 43, {}),
}


REQUESTS = {  # one for each, and none twice
    **{"new prompts": 5, "rewrites": 28, "their checks": 20, "completions": 94, "critiques": 184, "revisions": 176},
    **{"comparisons": 2 * 272, "the judge's check": 2 * 5},
}


def test_planted_cases_of_all_stages_are_counted_exactly(bench):
    write_inputs(bench.folder)
    with Script() as server:
        counts = bench.run(**settings(bench.folder, server.url))
    assert {s["stage"]: (s["in"], s["kept"], s["dropped"]) for s in counts["stages"]} == STAGES
    assert len(server.asked) == sum(REQUESTS.values())
    assert not [body for body in server.asked if "forty loaves" in json.dumps(body).casefold()]
    found, checked = counts["judge"]["comparisons"], counts["judge"]["check"]
    assert [found[name] for name in ("comparisons", "decided", "ties", "contradictions")] == [272, 212, 24, 24]
    assert found["first_place"] == {"value": pytest.approx((212 + 48) / 472), "of": 472}
    assert found["follows_place"]["value"] == pytest.approx(24 / 260)
    assert (checked["accuracy"]["value"], checked["ties"], checked["contradictions"]) == (pytest.approx(0.6), 1, 1)
    assert Counter(skip["stage"] for skip in bench.skipped()) == {
        **{"read": 1, "contamination": 1, "evolve, round 1": 2, "ask the teachers": 2, "compare": 12, "verify": 8}
    }


def test_rows_of_the_whole_run_carry_lineage_draft_and_critique(bench):
    write_inputs(bench.folder)
    with Script() as server:
        bench.run(**settings(bench.folder, server.url))
    rows = {row["prompt"][0]["content"]: row for row in bench.rows()}
    assert Counter(text.split()[0] for text in rows) == {  # but for new prompts, a rewrite beside each good original
        **{"plain": 2 * (6 + 3), "leak": 2, "regret": 2, "attached": 1, "equal": 1, "doubtful": 1, "forbidden": 1},
        **{"drift": 1, "tie": 4, "odd": 4, "same": 2, "silent": 2, "half": 2, "stern": 2},
    }
    assert sum(row["evolution"] == ["constraints"] for row in rows.values()) == 17
    for text, row in rows.items():
        kind, said = text.split()[0], row["completion"][0]["content"]
        if row["evolution"]:
            assert text == f"{row['evolved_from']} and then say why it is so"
        if kind in ("same", "silent", "half"):
            assert (row["draft"], row["critique"], row["principle"]) == (None, [], [])
            assert re.fullmatch(rf"{kind} of [ab] says \d+", said)
        else:
            assert said == f"{row['draft'][0]['content']} made better"
            assert row["critique"] == ["It could be better."]


FLAGS = {"completions_per_prompt": "--num_generations"}


def dataset(folder):
    """All that a run leaves, but for the settings."""
    rows = [row for path in sorted((folder / "out" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    counts = json.loads((folder / "out" / "counts.json").read_text())
    told = [counts[name] for name in ("rows", "stages", "judge", "variety", "notes", "writers")]
    return rows, told, (folder / "out" / "skipped.jsonl").read_text()


def files(folder):
    """How many files the stages have finished."""
    names = [name for _, _, names in os.walk(folder / "out.work") for name in names]  # folders may go meanwhile
    return sum(name.endswith(".jsonl") for name in names)


def kill_at_random(command, folder, draw):
    """Start the run and kill it after some more files, or at once; whether it was killed before its end."""
    with started(command) as process:
        wanted, deadline = files(folder) + draw.randint(0, 4), time.monotonic() + 600
        while process.poll() is None and files(folder) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)
        if process.poll() is not None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True


def check_kills(bench, times, seed):
    write_inputs(bench.folder)
    with Script(seconds=0.004) as server:
        given = settings(bench.folder, server.url)
        bench.run(**given)
        expected = dataset(bench.folder)
        assert len(expected[0]) == 43
        for folder in ("out", "out.work"):
            shutil.rmtree(bench.folder / folder)
        words = [word for name, value in given.items() for word in (FLAGS.get(name, f"--{name}"), *as_words(value))]
        command = [sys.executable, "-m", "trl_distill.cli", "generate", *words]
        draw, killed = random.Random(seed), 0
        for _ in range(times):
            killed += not (bench.out / "counts.json").exists() and kill_at_random(command, bench.folder, draw)
        assert killed >= min(times, 2)
        asked = len(server.asked)
        succeeds(command)
        assert dataset(bench.folder) == expected
        assert len(server.asked) - asked < sum(REQUESTS.values())  # what was finished is not asked again


def as_words(value):
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


@pytest.mark.slow
def test_the_whole_run_survives_being_killed(bench):
    check_kills(bench, times=2, seed=4)


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_run_survives_being_killed_ten_times(bench):
    check_kills(bench, times=10, seed=5)

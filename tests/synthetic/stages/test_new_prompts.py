"""New prompts: as many as asked for, none like the examples or each other, the same after a restart."""

from __future__ import annotations

import json
import random

import pytest

from trl_distill import TeacherUnavailable
from trl_distill.synthetic import Completion, Refusal, pipeline


WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def task(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def inventive(prompt, seed, model):
    """Writes a task where it is asked for one, and answers tasks."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if "New task:" not in text:
        return f"answer to {text}"
    kind = seed % 5
    if kind == 0:
        return f"New task: {text.split('Task 1:')[1].strip().splitlines()[0]}"  # one of the examples
    if kind == 1:
        return Completion(task(seed), "length")
    return f"New task:\n{task(seed % 97)}"  # repeats itself after a while


@pytest.mark.parametrize("chat", [False, True])
def test_as_many_as_asked_for_and_none_twice(bench, chat):
    seeds = [f"seed {task(1000 + i)}" for i in range(10)]
    bench.prompts([{"prompt": [{"role": "user", "content": s}] if chat else s, "answer": "x"} for s in seeds])
    bench.teach(inventive)
    counts = bench.run(new_prompts=20, seed=1)
    stage = next(stage for stage in counts["stages"] if stage["stage"] == "new prompts")
    assert stage["kept"] == 20
    assert stage["dropped"]["exact duplicate"] > 0
    assert stage["dropped"]["cut off at the length limit"] > 0
    rows = bench.rows()
    prompts = [row["prompt"][0]["content"] if chat else row["prompt"] for row in rows]
    assert prompts[:10] == seeds
    assert len(set(prompts)) == 30
    assert [row["answer"] for row in rows] == ["x"] * 10 + [None] * 20


def test_a_list_that_goes_on_is_cut_after_the_first_task(bench):
    bench.prompts([{"prompt": "an example"}])
    bench.teach(lambda p, s, m: Completion(f"{task(s)}\n\nTask 3:\nmore", "length") if "New task:" in p else "yes")
    bench.run(new_prompts=3, keep="all")
    assert all("Task" not in row["prompt"] for row in bench.rows())


def test_a_teacher_with_nothing_new_to_say_is_given_up(bench):
    bench.prompts([{"prompt": "an example"}, {"prompt": "another one"}])
    teachers = bench.teach(lambda p, s, m: "New task: an example" if "New task:" in p else f"yes, {p}")
    counts = bench.run(new_prompts=3)
    assert counts["rows"] == 2
    assert len(teachers[0].asked) == 5 * 4  # rounds in vain, chunk size
    assert any("New prompts are 0, not the 3 asked for" in note for note in counts["notes"])


def test_refusals_are_listed(bench):
    bench.prompts([{"prompt": "an example"}])
    bench.teach(
        lambda p, s, m: (Refusal("refused", "no, " * 3) if s % 2 else task(s)) if "New task:" in p else f"yes, {p}"
    )
    counts = bench.run(new_prompts=4)
    stage = next(stage for stage in counts["stages"] if stage["stage"] == "new prompts")
    assert len(bench.skipped()) == stage["dropped"]["refused"] > 0


def test_a_restart_uses_the_rounds_that_are_finished(bench):
    bench.prompts([{"prompt": f"seed {task(1000 + i)}"} for i in range(10)])
    teachers = bench.teach(inventive)
    bench.run(new_prompts=20)
    rows = bench.rows()

    def dies_in_the_third_round(prompt, seed, model):
        if "New task:" in prompt and len(teachers[0].asked) > 8:
            raise KeyboardInterrupt
        return inventive(prompt, seed, model)

    bench.out = bench.folder / "again"
    teachers = bench.teach(dies_in_the_third_round)
    with pytest.raises(KeyboardInterrupt):
        bench.run(new_prompts=20)
    asked = teachers[0].asked[:8]
    teachers = bench.teach(inventive)
    bench.run(new_prompts=20)
    assert bench.rows() == rows
    assert not any(json.dumps(prompt) in map(json.dumps, asked) for prompt in teachers[0].asked[:4])


def test_the_teachers_connections_are_closed_when_it_fails(bench):
    bench.prompts([{"prompt": f"question {i}"} for i in range(6)])

    def answer(prompt, seed, model):
        raise TeacherUnavailable("gone")

    loaded = bench.teach(answer)
    closed = []
    load = pipeline.load_source

    def load_and_note(*given):
        teacher = load(*given)
        teacher.close = lambda: closed.append(teacher)
        return teacher

    bench.monkeypatch.setattr(pipeline, "load_source", load_and_note)
    with pytest.raises(TeacherUnavailable):
        bench.run(new_prompts=3)
    assert closed == loaded
    assert len(loaded) == 1

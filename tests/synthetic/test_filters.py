"""Difficulty, language and contamination in a whole run, on planted cases: counts, columns, lists, and the card."""

from __future__ import annotations

import json
import os

import pytest
from helpers import make_model, make_tokenizer

from trl_distill.synthetic.records import Candidate
from trl_distill.synthetic.stages.select import difficulty_faults


BENCHMARK = "a baker sells forty loaves on monday and twice as many on tuesday how many loaves are that"


def by_stage(counts):
    return {stage["stage"]: stage for stage in counts["stages"]}


@pytest.fixture
def small(tmp_path):
    """A tiny difficulty model."""
    make_model("untied", seed=3).save_pretrained(tmp_path / "small")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "a"
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def letters(prompt, seed, model):
    return " ".join("abcdefghijklmnopqrstuvwxyz"[(seed >> i) % 26] for i in range(12))


def test_contaminated_prompts_are_never_asked_and_completions_are_dropped(bench):
    path = bench.folder / "bench.jsonl"
    path.write_text(json.dumps({"question": "Too short."}) + "\n" + json.dumps({"question": BENCHMARK}) + "\n")
    clean = [f"word{i} is the one about which I ask you" for i in range(5)]
    bench.prompts([{"prompt": text} for text in [*clean[:3], f"Question: {BENCHMARK.title()}?", *clean[3:], clean[0]]])
    made = iter(["New task: one that is really new to us all", f"New task: {BENCHMARK}", "New task: a second new one"])

    def teacher(prompt, seed, model):
        if "New task:" in prompt:
            return next(made, "New task: a third")
        return f"{BENCHMARK} yes" if prompt == clean[1] else f"about {prompt}, {seed}"

    teachers = bench.teach(teacher)
    counts = bench.run(benchmarks=[str(path)], new_prompts=2, near_duplicates=0)
    stages = by_stage(counts)
    reason = {"shares 13 words with a benchmark": 1}
    assert (stages["contamination"]["in"], stages["contamination"]["kept"]) == (7, 6)
    for name in ("contamination", "filter"):
        assert stages[name]["dropped"] == reason
    assert stages["new prompts"]["dropped"]["shares 13 words with a benchmark"] == 1
    assert stages["ask the teachers"]["in"] == 7
    assert not [asked for one in teachers for asked in one.asked if "forty loaves" in asked.casefold()]
    assert counts["rows"] == 6
    assert counts["notes"] == [
        "Of 2 benchmark rows, 1 have no text of 8 words or more, so nothing was compared with them."
    ]
    listed = [skip for skip in bench.skipped() if "row 2 of" in skip["why"]]
    assert [skip["stage"] for skip in listed] == ["contamination", "new prompts", "filter"]
    assert listed[0]["where"] == "line 4"
    assert "'a baker sells forty loaves on monday and twice as many on tuesday'" in listed[0]["why"]


def test_other_benchmarks_are_other_prompts(bench):
    path = bench.folder / "bench.jsonl"
    path.write_text(json.dumps({"prompt": BENCHMARK}) + "\n")
    bench.prompts([{"prompt": f"p{i}"} for i in range(3)])
    bench.teach(lambda prompt, seed, model: f"{prompt} {seed}")
    first = bench.run(benchmarks=[str(path)])
    assert bench.run(benchmarks=[str(path)]) == first
    path.write_text(json.dumps({"prompt": f"{BENCHMARK} again"}) + "\n")
    with pytest.raises(ValueError, match="made with other settings: `benchmarks_digest`"):
        bench.run(benchmarks=[str(path)], overwrite=True)


def test_rows_in_other_languages_are_dropped(bench):
    english = "Tell me why the sky is blue and why the sunset is red, please"
    bench.prompts([{"prompt": english}, {"prompt": f"{english} now"}, {"prompt": "2 + 2 ="}])
    german = "Der Himmel ist blau, weil das kurzwellige Licht in der Luft stärker gestreut wird als das langwellige."
    bench.teach(lambda prompt, seed, model: german if "now" in prompt else "4")
    counts = bench.run(language="en")
    assert by_stage(counts)["filter"]["dropped"] == {"completion in another language (de)": 1}
    assert counts["rows"] == 2


def test_difficulty_is_kept_with_rows_and_a_share_or_range_selects(bench, small):
    bench.prompts([{"prompt": f"a b {c}", "note": c} for c in "cdefghijklmnop"])
    bench.teach(letters)
    settings = {"difficulty_model": small, "near_duplicates": 0, "max_repetition": 1.0}
    counts = bench.run(**settings)
    assert "difficulty" not in by_stage(counts)
    rows = bench.rows()
    assert len(rows) == 14
    assert all(row["ifd"] == row["perplexity"] / row["perplexity_alone"] for row in rows)
    hardest = sorted((row["ifd"] for row in rows if row["ifd"] < 1), reverse=True)
    assert 4 < len(hardest) < 14  # the tiny model gives both kinds
    counts = bench.run(**settings, difficulty_keep=0.2, overwrite=True)
    assert sorted((row["ifd"] for row in bench.rows()), reverse=True) == hardest[:3]
    assert by_stage(counts)["difficulty"]["dropped"] == {
        "IFD of 1 or more": 14 - len(hardest),
        "not among the 20% with the highest IFD": len(hardest) - 3,
    }
    counts = bench.run(**settings, difficulty_keep=1.0, overwrite=True)
    assert counts["rows"] == len(hardest)
    assert any("not the 14 asked for" in note for note in counts["notes"])
    low, high = hardest[3], hardest[1]
    counts = bench.run(**settings, difficulty_min=low, difficulty_max=high, overwrite=True)
    assert sorted((row["ifd"] for row in bench.rows()), reverse=True) == hardest[2:4]
    assert by_stage(counts)["difficulty"]["in"] == 14


def test_pairs_carry_the_difficulty_of_both(bench, small, reward):
    reward("def size(completions, **kwargs):\n    return [float(sum(map(ord, c))) for c in completions]\n")
    bench.prompts([{"prompt": f"a b {c}"} for c in "cdefgh"])
    bench.teach(letters)
    settings = {"difficulty_model": small, "pairs": True, "completions_per_prompt": 2, "max_repetition": 1.0}
    bench.run(**settings, reward_funcs=["my_verifier.size"], near_duplicates=0, difficulty_min=0.0)
    rows = bench.rows()
    assert len(rows) == 6
    assert all(row["chosen_ifd"] > 0 and row["rejected_perplexity"] > 1 for row in rows)


def test_selection_by_difficulty_at_its_edges(bench):
    def config(**changes):
        return bench.config(difficulty_model="m", **changes)

    ifds = [0.5, 1.0, None, 0.9, 0.5, 2.0]
    none = "difficulty not measured"
    assert difficulty_faults(ifds, config(difficulty_min=0.5, difficulty_max=1.0)) == [
        *(None, "IFD of 1 or more", none, None, None, "IFD of 1 or more")
    ]
    kept = difficulty_faults(ifds, config(difficulty_keep=2 / 6))
    assert [i for i, fault in enumerate(kept) if fault is None] == [0, 3]  # of equals the first
    assert kept[2] == none
    row = Candidate("p", "c", "stop", "t", None, {}, {}, {"ifd": 0.5}).as_row(False)
    assert row["ifd"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"difficulty_keep": 0.2}, "no model measures it"),
        ({"difficulty_model": "m", "difficulty_keep": 1.5}, "share above 0"),
        ({"difficulty_model": "m", "difficulty_keep": 0.5, "difficulty_min": 0.1}, "Keep one"),
        ({"difficulty_model": "m", "difficulty_min": 0.9, "difficulty_max": 0.9}, "No row has"),
        ({"difficulty_model": "m", "difficulty_min": -1.0}, "never below 0"),
        ({"language": "English"}, "ISO 639"),
        ({"benchmark_ngram": 2}, "by chance"),
    ],
)
def test_wrong_settings(bench, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.config(**changes)


def test_lists_may_be_written_with_commas(bench):
    assert bench.config(language="en,de").language == ["en", "de"]
    assert bench.config(language=["en", "fr"], benchmarks="b.jsonl").benchmarks == ["b.jsonl"]


def test_the_card_compares_rows_with_seeds_and_human_data_and_tells_of_planted_collapse(bench):
    bench.prompts([{"prompt": f"tell w{7 * i} of w{3 * i + 1} and w{11 * i + 5} or else w{i}"} for i in range(30)])
    bench.prompts([{"prompt": f"human w{i}", "completion": f"so w{i} says w{i + 9}"} for i in range(20)], "human.jsonl")
    bench.teach(
        lambda prompt, seed, model: (
            f"New task: write a story about number {seed % 100_000}" if "New task:" in prompt else f"w{seed} ({prompt})"
        )
    )
    human = {"human_data": str(bench.folder / "human.jsonl"), "human_share": 0.1}
    counts = bench.run(new_prompts=80, near_duplicates=0, **human)
    variety = counts["variety"]
    assert list(variety["prompts"]) == ["seeds", "dataset", "human"]
    assert list(variety["completions"]) == ["dataset", "human"]
    assert {of_set["texts"] for of_set in variety["prompts"].values()} == {20}
    assert list(variety["rounds"]) == ["seeds", *(f"new prompts, quarter {i}" for i in range(1, 5))]
    assert any("less varied" in note and "(seeds)" in note for note in counts["notes"])
    card = (bench.out / "README.md").read_text()
    for text in ("## Variety", "| prompts | seeds | dataset | human |", "| distinct_2 |", "| new prompts, quarter 4 |"):
        assert text in card
    assert "less varied" in card


def evolving(prompt, seed, model):
    """Rewrites prompts, one of them into a benchmark's; answers others."""
    if "#Given Prompt#:" not in prompt:
        return letters(prompt, seed, model)
    parent = prompt.split("#Given Prompt#:\n")[1].split("\n\n#")[0]
    return f"well {BENCHMARK}" if parent.startswith("bad") else f"{parent} and what of word{seed % 1000}"


def test_contaminated_rewrites_are_never_completed(bench):
    path = bench.folder / "bench.jsonl"
    path.write_text(json.dumps({"prompt": BENCHMARK}) + "\n")
    bench.prompts([{"prompt": f"{kind} river {kind} stone"} for kind in ("good", "bad", "nice")])
    teachers = bench.teach(evolving)
    counts = bench.run(evolve=1, benchmarks=[str(path)], near_duplicates=0)
    assert by_stage(counts)["evolve, round 1"]["dropped"] == {"shares 13 words with a benchmark": 1}
    assert by_stage(counts)["ask the teachers"]["in"] == 5
    assert not [asked for one in teachers for asked in one.asked if "forty loaves" in asked]
    (listed,) = bench.skipped()
    assert (listed["stage"], listed["where"]) == ("evolve, round 1", "prompt 1")
    assert "row 1 of" in listed["why"]
    assert sum(counts["variety"]["last operation"].values()) == 2


def test_a_run_with_filters_that_is_interrupted_comes_to_the_same_dataset(bench, small, monkeypatch):
    path = bench.folder / "bench.jsonl"
    path.write_text(json.dumps({"prompt": BENCHMARK}) + "\n")
    bench.prompts([{"prompt": f"{kind} river {i} stone"} for i in range(4) for kind in ("good", "bad")])
    bench.teach(evolving)
    settings = {"evolve": 1, "benchmarks": [str(path)], "difficulty_model": small, "difficulty_keep": 0.5}
    settings |= {"language": ["en"], "near_duplicates": 0, "max_repetition": 1.0}
    complete, rows = bench.run(**settings), bench.rows()
    replace, made = os.replace, 0

    def counted(*paths):
        nonlocal made
        made += 1
        if made == last:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)
    last = 1
    while True:
        bench.out, made = bench.folder / f"out{last}", 0
        try:
            bench.run(**settings)
            break
        except KeyboardInterrupt:
            pass
        assert bench.run(**settings) == complete
        assert bench.rows() == rows
        last += 1
    assert last > 8

"""What the page on synthetic data tells of its example is what the example's results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trl_distill.synthetic.stages.judge_check import sentences


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "synthetic_data.md").read_text()
FOUND = json.loads((ROOT / "docs" / "results" / "synthetic" / "example.json").read_text())
FOUND.pop("machine")


def test_the_stages_shown_are_those_of_the_run():
    stages = {stage["stage"]: stage for name in FOUND for stage in FOUND[name]["stages"]}
    part = PAGE[PAGE.index("`--evolve_keep all`") : PAGE.index("### Difficulty")]
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \| (\d+) \| (\d+) \| ([^|]*)\|$", part, re.MULTILINE)
    assert len(rows) == 3
    for name, unit, given, kept, why in rows:
        stage = stages[name]
        assert [unit, int(given), int(kept)] == [stage["unit"], stage["in"], stage["kept"]]
        assert why.strip() == "; ".join(f"{reason}: {count}" for reason, count in stage["dropped"].items())


def test_the_check_of_the_judge_is_quoted_as_it_was_printed():
    found = json.loads((ROOT / "docs" / "results" / "synthetic" / "judge_check.json").read_text())
    quoted = " ".join(re.sub(r"^> ?(- )?", "", line).strip() for line in PAGE.splitlines() if line.startswith(">"))
    assert " ".join(quoted.split()) == " ".join(sentences(found))
    assert f"In {found['contradictions']} of {found['comparisons']} comparisons" in " ".join(PAGE.split())


def test_what_the_weak_model_gets_wrong_is_told_with_its_numbers():
    part = " ".join(PAGE[PAGE.index("## A weak model") : PAGE.index("## Reference")].split())
    rewrites = FOUND["all"]["rewrites"]
    assert (
        f"of the {len(rewrites)} rewrites in the dataset, {sum(one['asks'] for one in rewrites)} ask something" in part
    )
    filtered = next(stage for stage in FOUND["all"]["stages"] if stage["stage"] == "filter")
    cut = filtered["dropped"]["cut off at the length limit"]
    assert f"Of {filtered['in']} completions, {cut} were cut off" in part
    for quoted in re.findall(r'became "([^"]+)"', part):
        assert quoted in [one["to"] for one in rewrites]


def test_what_became_of_comparisons_and_revisions_is_told_with_its_numbers():
    part = " ".join(PAGE[PAGE.index("## A weak model") : PAGE.index("## Reference")].split())
    capitals, judged = FOUND["revised"]["capitals"], FOUND["best"]["judge"]["comparisons"]
    assert (
        f"Of {capitals['pairs']} pairs about capitals, {capitals['right_drafts']} drafts name the right one and "
        f"{capitals['right_revisions']} revisions do: {capitals['spoilt']} were spoilt, none was mended" in part
    )
    assert capitals["mended"] == 0
    assert f"Of {judged['comparisons']} comparisons, {judged['decided']} have a winner" in part
    silent = sum(judged["no_verdict"].values())
    assert f"in {judged['contradictions']} the judge contradicts itself, and to {silent} it gives no verdict" in part
    shown = FOUND["revised"]["shown"][0]
    assert f'"{shown["draft"]}", criticised for stereotypes, came back as "{shown["revision"]}"' in part
    for name in FOUND:
        assert f"`{name}` ({FOUND[name]['rows']}" in part


@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_dataset_of_the_example_was_read_by_a_trainer(name):
    losses = FOUND[name]["read_by"]["losses"]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


def test_throughput_is_quoted_as_it_was_measured():
    found = json.loads((ROOT / "docs" / "results" / "synthetic" / "throughput.json").read_text())
    at_once, slow = found["at_once"], found["slow_answers"]
    page = " ".join(PAGE.split())
    assert f"{at_once['prompts_per_second']:,.0f} prompts per second where it answers at once" in page
    assert f"it is kept {slow['busy_share']:.1%} busy".replace("%", " %") in page
    largest = max(run["memory"]["growth_mib"] for run in (at_once, slow))
    assert f"Memory grows by {largest} MiB or less" in page

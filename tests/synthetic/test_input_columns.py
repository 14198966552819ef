"""Columns of the input with names that stages write: kept where the stage is not used, refused where it is."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("evolution", [3, ["deeper"], "deeper"])
def test_a_column_evolution_is_the_users_own_where_nothing_is_evolved(bench, evolution):
    bench.prompts([{"prompt": f"question {i}", "evolution": evolution, "evolved_from": "x"} for i in range(6)])
    bench.teach(lambda prompt, seed, model: f"I am sorry, I cannot answer {prompt}")
    counts = bench.run(near_duplicates=0)
    assert counts["rows"] == 6
    assert "last operation" not in counts["variety"]
    assert [row["evolution"] for row in bench.rows()] == [evolution] * 6


@pytest.mark.parametrize(
    ("column", "settings"),
    [
        ("evolution", {"evolve": 1}),
        ("reasoning", {"keep_reasoning": "column"}),
        ("critique", {"revise": "default", "keep_drafts": True}),
    ],
)
def test_a_column_that_a_stage_would_write_is_refused_before_anyone_is_asked(bench, column, settings):
    bench.prompts([{"prompt": f"question {i}", column: "x"} for i in range(6)])
    loaded = bench.teach(lambda prompt, seed, model: "words")
    with pytest.raises(ValueError, match=f"has a column '{column}', which `{next(iter(settings))}|`keep_drafts`"):
        bench.run(**settings)
    assert loaded == []

"""Families of causal models: each holds or is refused, as docs/models.md says."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from scripts.studies.models import families, flash_stand_in
from scripts.studies.models.families import FAILS, HOLDS, NOT_RUN, REFUSED, FamilyResult, probe
from scripts.studies.models.page import PAGE, RESULTS, Results, page, row
from scripts.studies.models.tiny import FAMILIES, NOT_TRIED, configuration, tiny_model
from trl_distill.models import properties


COMMITTED = Results.load(RESULTS)
same_transformers = pytest.mark.skipif(
    version("transformers") != COMMITTED.versions["transformers"],
    reason=f"docs/models.md is of transformers {COMMITTED.versions['transformers']}",
)
HANDFUL = [
    *("llama", "qwen3_moe", "gemma2", "gpt2", "qwen3_next", "hunyuan_v1_dense", "persimmon", "granitemoe"),
    *("xlnet", "bert", "gemma3", "musicgen"),
]


def assert_as_committed(family: str) -> None:
    found = probe(family)
    assert found.outcome in ((NOT_RUN,) if family in NOT_TRIED else (HOLDS, REFUSED)), found.reason
    assert row(found) in PAGE.read_text().splitlines()


@same_transformers
@pytest.mark.parametrize("family", HANDFUL)
def test_a_family_is_as_the_page_says(family):
    assert_as_committed(family)


@pytest.mark.slow
@same_transformers
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HANDFUL])
def test_every_family_is_as_the_page_says(family):
    """A minute in all."""
    assert_as_committed(family)


@same_transformers
def test_the_page_has_every_family_and_is_made_of_the_results():
    assert [result.family for result in COMMITTED.families] == list(FAMILIES)
    assert PAGE.read_text() == page(COMMITTED)
    assert {result.family for result in COMMITTED.families if result.outcome == NOT_RUN} == set(NOT_TRIED)


def test_padding_counts_where_it_is_said_to():
    """No family loses the cut of its prompts for nothing."""
    counts = {result.family for result in COMMITTED.families if result.padding == "counts, kept"}
    assert counts >= properties.PADDING_COUNTS


def test_a_head_that_is_read_wrongly_fails(monkeypatch):
    """The comparison sees a scale that is left out."""
    monkeypatch.setattr("trl_distill.heads.lm_head.logit_scale", lambda config: 1.0)
    monkeypatch.setattr("trl_distill.checks.models.check_logits", lambda *args: None)
    found = probe("granite")
    assert found.outcome == FAILS
    assert found.gradient_error > 0.01


def test_padding_that_is_cut_though_it_counts_fails(monkeypatch):
    monkeypatch.setattr(properties, "PADDING_COUNTS", set())
    assert probe("hunyuan_v1_dense").outcome == FAILS


def test_rows_that_see_each_other_fail(monkeypatch):
    """FlashAttention without the beginnings of rows."""
    monkeypatch.setattr("trl_distill.models.hidden_states.is_exact", lambda *args: True)
    found = probe("persimmon")
    assert found.outcome == FAILS
    assert "packed rows are off" in found.reason


def test_masked_rows_that_see_each_other_fail(monkeypatch):
    monkeypatch.setattr("trl_distill.models.packing.is_exact", lambda *args: True)
    found = probe("falcon")
    assert found.outcome == FAILS
    assert "masked, off by" in found.reason


def test_a_page_with_a_family_that_fails_is_not_written():
    with pytest.raises(AssertionError, match="mend it, or refuse it"):
        page(Results(COMMITTED.versions, [FamilyResult("llama", FAILS)]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_stand_in_for_flash_attention_computes_attention(family):
    """Windows, a soft cap and sinks, on padded rows."""
    plain = tiny_model(configuration(family), 1)
    inputs = families.batch()
    ids, attended = families.whole(inputs)
    with torch.no_grad(), flash_stand_in.stand_in(type(plain)):
        model = tiny_model(configuration(family), 1, attn_implementation=flash_stand_in.IMPLEMENTATION)
        found = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[attended.bool()]
        expected = plain(input_ids=ids, attention_mask=attended, use_cache=False).logits[attended.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

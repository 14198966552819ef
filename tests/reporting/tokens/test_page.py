"""The page as text: what is embedded cannot break out of it, and means are those of enumeration."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_distill.reporting.tokens import page
from trl_distill.reporting.tokens.page import embedded
from trl_distill.reporting.tokens.table import curve, summary


@given(st.text())
def test_no_text_can_end_the_element_that_it_stands_in(text):
    found = embedded({"text": text})
    assert not set("<>&\u2028\u2029") & set(found)
    assert json.loads(found)["text"] == text.encode("utf-8", "replace").decode()


def test_what_models_wrote_is_in_the_data_alone(table):
    html = page(table(title="<b>1 & 2</b>"))
    assert html.count("<script") == html.count("</script>") == 2  # the data and the page's own
    assert "<title>&lt;b&gt;1 &amp; 2&lt;/b&gt;</title>" in html
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])
    assert data["rows"][1]["texts"][1] == "</script><script>window.hurt=1</script>"


def test_the_page_asks_for_nothing_from_outside(table):
    html = page(table())
    assert "default-src 'none'" in html
    assert not re.search(r"""(?:src|href)\s*=\s*["']?[^"'#\s]""", html.split('<script id="data"')[0])
    assert re.findall(r"https?://[^\s\"']+", html) == ["http://www.w3.org/2000/svg"]  # a namespace, never fetched


def test_numbers_that_are_none_are_shown_as_such(table):
    broken = table()
    view = replace(broken.completions[0].views[0], kl=(float("inf"), 0.1, float("nan"), 0.3))
    rows = (replace(broken.completions[0], views=(view,)), *broken.completions[1:])
    html = page(replace(broken, completions=rows))
    assert '"kl":[null,0.1,null,0.3]' in html
    assert summary(rows[:1]).kl == pytest.approx(0.2)


def test_an_empty_report_is_refused(table):
    with pytest.raises(ValueError, match="no completion"):
        page(replace(table(), completions=()))


def test_means_are_over_tokens_and_rewards_over_completions(table):
    found, rows = summary(table().completions), table().completions
    assert found.kl == pytest.approx(statistics.fmean(kl for row in rows for kl in row.views[0].kl))
    assert (found.completions, found.tokens, found.reward) == (3, 13, 0.5)
    assert found.truncated == pytest.approx(2 / 3)


@pytest.mark.parametrize("points", [1, 2, 3, 100])
def test_the_curve_holds_every_token_once(table, points):
    rows = table().completions
    found = curve(rows, points=points)
    assert len(found) <= points
    assert sum(point.count for point in found) == sum(len(row.ids) for row in rows)
    total = sum(point.kl * point.count for point in found)
    assert total == pytest.approx(sum(kl for row in rows for kl in row.views[0].kl))
    assert [point.first for point in found[1:]] == [point.last + 1 for point in found[:-1]]

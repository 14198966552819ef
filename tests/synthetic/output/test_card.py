"""The card of a dataset shows names as they are written."""

from __future__ import annotations

from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.output.card import card
from trl_distill.synthetic.output.counts import Skip, Stage


def test_names_are_no_markdown():
    name = "a[b](c)|$d$"
    config = GenerateConfig(dataset_name="p.jsonl", output_dir="out", teacher_models={name: "folder"})
    stage = Stage("ask <b>", "prompts")
    stage.count(f"refused by {name}")
    text = card(config, {"seed": f"`{name}`"}, [stage], {name: 1}, [Skip("x", "*y*", "[z]")], [])
    shown = r"a\[b\](c)\|\$d\$"
    assert rf"| ask \<b\> | prompts | 1 | 0 | 1 | refused by {shown}: 1 |" in text
    assert f"| {shown} | transformers | folder |" in text
    assert f"| {shown} | 1 | 100.0% |" in text
    assert r"| `seed` | `` `a[b](c)\|$d$` `` |" in text
    assert r"| x | \*y\* | \[z\] |" in text

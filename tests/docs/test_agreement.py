"""Pages, examples and sweeps say the same thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FOR_TEACHERS = ["README.md", "docs/distributed.md", "trl_distill/cli/train.py"]
SWEEPS = ["scripts/sweeps/beta.yaml", "scripts/sweeps/divergence.yaml"]


def cited() -> float:
    """The rate for full fine-tuning in README's table, which names its source."""
    (row,) = re.findall(r"^\| `learning_rate` \|.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert "https://" in row
    return float(re.search(r"trains with ([\d.e-]+),", row)[1])


@pytest.mark.parametrize("path", FOR_TEACHERS + SWEEPS)
def test_examples_have_the_cited_learning_rate(path):
    text = (ROOT / path).read_text()
    found = re.findall(r"learning_rate(?:=| |:\n +value: )([\d.]+e-\d+)", text)
    assert found
    assert {*map(float, found)} == {cited()}


def test_the_closed_form_is_stated_for_the_discount_at_which_it_holds():
    """π ∝ teacher · e^{r/β} is where training ends at `kl_discount=1` only."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for paragraph in re.split(r"\n\n|\n(?=\|)", path.read_text()):
            if re.search(r"(ends|reaches|Training)[^|]*e\^\{r/β\}", paragraph):
                assert re.search(r"kl_discount=1|γ = 1", paragraph), f"{path.name}: {paragraph}"


def test_metrics_say_what_the_parts_of_the_loss_hold():
    text = (ROOT / "docs" / "metrics.md").read_text()
    (loss,) = re.findall(r"^\| `distill/loss` \|.*", text, re.MULTILINE)
    (policy,) = re.findall(r"^\| `policy_loss` \|.*", text, re.MULTILINE)
    assert "already multiplied by beta" in loss
    assert "minus the mean advantage on fresh rollouts" in policy

"""The pictures of the docs: titles, axes, legends, and the text for those who do not see them."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest


pytest.importorskip("matplotlib")

from scripts.studies import pictures
from scripts.studies.benchmark import growth
from scripts.studies.demo import rewards
from scripts.studies.reproduce import figures, gradient_variance
from scripts.studies.reproduce.records import RunRecord


DOCS = Path(__file__).parents[2] / "docs"
CLAIMS = {path.stem.replace("-", " "): path for path in sorted((DOCS / "results").glob("*.json"))}
SHARES = {"gap", "mismatch", "diversity", "rewards", "estimators", "small student"}


def runs_of(claim: str) -> list[RunRecord]:
    return [RunRecord.from_json(one) for one in json.loads(CLAIMS[claim].read_text())["runs"]]


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("claim", figures.PICTURES)
def test_a_claims_picture_has_a_title_whole_axes_and_a_legend_beside_it(claim):
    figure = figures.figure(claim, runs_of(claim))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert figures.PICTURES[claim].title in texts(figure)
    assert axis.get_title().startswith("3 seeds")
    low, high = axis.get_ylim()
    assert (low, high) == ((0, 1) if claim in SHARES else (0, 16))
    if claim != "small student":  # its horizontal axis has names
        assert axis.get_xlim()[0] == 0 or claim == "collapse"
    inside = axis.get_window_extent()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(inside)
    for line in axis.lines:
        for x, y in line.get_xydata():
            assert axis.get_xlim()[0] <= x <= axis.get_xlim()[1]
            assert low <= y <= high


def test_a_curve_that_begins_late_says_why():
    figure = figures.figure("gap", runs_of("gap"))
    (axis,) = figure.axes
    assert "dotted: the teacher writes answers, and nothing is trained yet" in axis.get_title()
    (dotted,) = [line for line in axis.lines if line.get_linestyle() == ":"]
    starts = [line.get_xdata()[0] for line in axis.lines if line is not dotted]
    assert [*dotted.get_xdata()] == [0, max(starts)]
    on_policy = [run for run in runs_of("gap") if run.arm == "on-policy"]
    (axis,) = figures.figure("gap", on_policy).axes
    assert "dotted" not in axis.get_title()


def test_a_curve_that_ends_early_says_why():
    (axis,) = figures.figure("estimators", runs_of("estimators")).axes
    assert "ends early where answers get short" in axis.get_title()
    (axis,) = figures.figure("rewards", runs_of("rewards")).axes
    assert "early" not in axis.get_title()


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory) -> Path:
    """The docs, with all pictures drawn again."""
    docs = tmp_path_factory.mktemp("page") / "docs"
    docs.mkdir()
    shutil.copy(DOCS.parent / "README.md", docs.parent)
    for path in ("results.md", "benchmarks.md"):
        shutil.copy(DOCS / path, docs)
    shutil.copytree(DOCS / "results", docs / "results")
    (docs / "images").mkdir()
    pictures.main([], docs)
    return docs


def test_the_pages_agree_with_the_numbers(redrawn):
    """Tables and alternative texts are those that the script writes, and the numbers stay what they were."""
    assert (redrawn / "results.md").read_text() == (DOCS / "results.md").read_text()
    for path in CLAIMS.values():
        assert (redrawn / "results" / path.name).read_text() == path.read_text()
    page = (DOCS / "benchmarks.md").read_text()
    assert f"![{growth.in_words(growth.curves_on_page(page, 'cpu'))}](images/benchmark_growth.png)" in page
    noise = gradient_variance.in_words(pictures.variance_results(DOCS))
    assert f"![{noise}](images/variance.png)" in (DOCS / "objective.md").read_text()
    front = pictures.pareto_in_words(pictures.pareto_points(DOCS))
    assert f"![{front}](images/pareto.png)" in (DOCS / "sweeps.md").read_text()


def test_every_picture_is_drawn_and_shown_with_its_text(redrawn):
    drawn = {path.name for path in (redrawn / "images").iterdir()}
    assert {"benchmark_growth.png", "results-gap.png", "variance.png", "pareto.png"} <= drawn
    shown = {}
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        shown |= {Path(path).name: alt for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)]+\.png)\)", page.read_text())}
    assert shown.keys() == {path.name for path in (DOCS / "images").iterdir()}
    assert not [name for name in drawn if not re.search(r"\d", shown[name])]


def test_alternative_texts_have_the_numbers_of_the_table():
    text = figures.alt_text("rewards", runs_of("rewards"))
    assert "both, beta=0.3 84.6% at 0.085 nats" in text
    assert "teacher only 82.6% at 0.089 nats" in text
    assert "SFT, then slower 79%" in figures.alt_text("gap", runs_of("gap"))
    assert "All begin at 14.5" in figures.alt_text("collapse", runs_of("collapse"))


def test_an_unknown_picture_is_refused(capsys):
    with pytest.raises(SystemExit):
        pictures.main(["no-such-picture"])
    assert "Choose from" in capsys.readouterr().err


PAGE = """<!-- benchmark cpu: begin -->
### Growth

| grows | to | contender | update, s | peak, MiB | ratio of time | ratio of memory |
|---|---|---|---|---|---|---|
| tokens per step | 512 | `OPDTrainer` | 0.294 | 46 |  |  |
| tokens per step | 512 | `DistillationTrainer` | 0.369 | 91 | 0.80 (0.77–0.80) | 0.50 |
| tokens per step | 2048 | `OPDTrainer` | 0.78 | 108 |  |  |
| tokens per step | 2048 | `DistillationTrainer` |  | out of memory | not measured |  |
| tokens per step, 4 × the vocabulary | 512 | `OPDTrainer` |  | 152 |  |  |

### Memory against tokens
<!-- benchmark cpu: end -->
"""


def test_growth_is_read_from_the_page():
    curves = growth.curves_on_page(PAGE, "cpu")
    assert curves["tokens"] == {
        "OPDTrainer": {"update_s": [(512, 0.294), (2048, 0.78)], "peak_mib": [(512, 46), (2048, 108)]},
        "DistillationTrainer": {"update_s": [(512, 0.369)], "peak_mib": [(512, 91)]},
    }
    assert curves["teacher"] == {}


@pytest.fixture
def shown(monkeypatch):
    """The figure that pyplot would have closed."""
    import matplotlib.pyplot as plt

    plt.close("all")
    monkeypatch.setattr(plt, "close", lambda _: None)
    yield plt.gcf
    monkeypatch.undo()
    plt.close("all")


def test_noise_is_drawn_from_zero_with_a_title(tmp_path, shown):
    gradient_variance.draw(pictures.variance_results(DOCS), tmp_path / "variance.png")
    figure = shown()
    assert any("as a multiple of full" in text for text in texts(figure))
    left, right = figure.axes
    assert left.get_ylim()[0] == right.get_xlim()[0] == 0
    assert right.get_xscale() == "linear"


def test_rewards_have_a_title_whole_axes_and_a_legend_beside_them(tmp_path, shown):
    runs = {
        name: [rewards.RewardRun(name, seed, {}, end, 0.1, 9, [(0, 0.2), (25, end)]) for seed in rewards.SEEDS]
        for name, end in (("reward only", 0.36), ("teacher only", 1.0), ("both", 0.97), ("distil, then RL", 0.97))
    }
    rewards.draw(runs, 0.993, tmp_path / "rewards.png")
    figure = shown()
    (axis,) = figure.axes
    assert any(text.startswith("Accuracy over the steps") for text in texts(figure))
    assert axis.get_ylim() == (0, 1)
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    assert "both 97.0%" in texts(figure)


def test_growth_begins_at_zero_and_shows_every_point(tmp_path, shown):
    curves = growth.curves_on_page((DOCS / "benchmarks.md").read_text(), "cpu")
    growth.draw(curves, tmp_path / "growth.png")
    figure = shown()
    assert any("as one size grows" in text for text in texts(figure))
    for panel in figure.axes:
        assert panel.get_xlim()[0] == panel.get_ylim()[0] == 0
        assert max(y for line in panel.lines for y in line.get_ydata()) <= panel.get_ylim()[1]


def test_the_readmes_rewards_are_those_of_its_table():
    text = (pictures.DOCS.parent / "README.md").read_text()
    teacher, recipes = pictures.rewards_on_page(text)
    assert list(recipes) == ["reward only", "teacher only", "both", "distil, then RL"]
    assert f"the teacher has {teacher:.1f}%" in text
    for accuracies, kl in recipes.values():
        assert len(accuracies) == 3
        assert f"{statistics.mean(accuracies):.1f}%" in text.split("![Accuracy after 500 steps")[1].split("]")[0]
        assert f"{kl:.3f}"[1:] in text.split("![Accuracy after 500 steps")[1].split("]")[0]

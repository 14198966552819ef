"""Names, paths, tokens and notes are shown as they are written: on terminals, in pictures, in Markdown."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from trl_distill import foreign_text
from trl_distill.checks.findings import Finding, Report
from trl_distill.reporting.curves import training_figure


NASTY = (
    *("[/INST]", "[INST]", "[/]", "[red]x", "[[x]]", "[link=a]b[/link]", "\\[x]", "x\\", ":smile:", "{task.total}"),
    *("$x^$", "$\\frac$", "$", "$$", "a$b$c", "\\$x\\$", "_x", "__", "%s", "a|b", "<b>", "x^2_3"),
)


def terminal(markup: bool = False) -> Console:
    how = {"file": io.StringIO(), "width": 200}
    return Console(**how) if markup else foreign_text.console(**how)


def printed(console: Console) -> str:
    return console.file.getvalue()


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("markup", [False, True], ids=["our console", "any console"])
def test_terminals(text, markup):
    console = terminal(markup)
    if not markup:
        console.print(f"It is in {text}", style="yellow")
    table = Table(title=foreign_text.as_written(text))
    table.add_column(foreign_text.as_written(text))
    table.add_row(foreign_text.as_written(text, "red"))
    console.print(table)
    with Progress(foreign_text.description_column(), console=console) as progress:
        progress.add_task(text, total=1)
    assert printed(console).count(text) == 4 + (not markup)


def test_no_console_reads_markup():
    package = Path(foreign_text.__file__).parent
    makers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"(?<!\.)\b(Console|TextColumn)\(", path.read_text())
    }
    assert makers == {"foreign_text.py"}


@pytest.mark.parametrize("text", NASTY)
def test_a_finding_in_the_preflights_table(text):
    report = Report([Finding(f"context, {text}", "warning", f"found {text}", f"write {text}")])
    for markup in (False, True):
        console = terminal(markup)
        console.print(report.table())
        assert printed(console).count(text) == 3
        assert "warning" in printed(console)
        assert "[yellow]" not in printed(console)


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20))
def test_any_text_on_any_console(text):
    console = terminal(markup=True)
    console.print(foreign_text.as_written(text), soft_wrap=True)
    assert printed(console) == f"{text}\n"


def shown(figure) -> Counter[str]:
    """The texts of a figure after it was drawn, as they are shown."""
    from matplotlib import cbook
    from matplotlib.text import Text

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*legend.*")
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    found = [text.get_text() for text in figure.findobj(Text)]
    assert not any(map(cbook.is_math_text, found))
    return Counter(text.replace(r"\$", "$").strip() for text in found)


@pytest.mark.parametrize("text", [text for text in NASTY if set(text) & set("$_%\\")])
def test_pictures(text):
    pytest.importorskip("matplotlib")
    from trl_distill.sweeps.figures import Point, metric_figure, pareto_figure, ranking_figure

    log = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]
    assert shown(training_figure({"a": log, text: log}, title=text))[text] == 2
    points = [Point(text, 0.1, 0.2), Point("b", 0.2, 0.1)]
    assert shown(pareto_figure(points, text, text, text))[text] == 4
    found = shown(metric_figure(points, text, text, True, text))
    assert (found[text], found[f"best: {text}"]) == (3, 1)
    assert shown(ranking_figure([(text, 1.0), ("b", 0.5)], text, True, text))[text] == 4  # a tick has two


@pytest.mark.parametrize("text", [*NASTY, "`code`", "``", "a`b", "*b*", "snake_case", "&lt;", "![x](y)"])
def test_text_and_code_in_markdown(text):
    """As a reader of CommonMark shows it."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (paragraph,) = [token for token in parser.parse(f"x {foreign_text.in_markdown(text)}") if token.type == "inline"]
    assert {token.type for token in paragraph.children} == {"text"}
    assert "".join(token.content for token in paragraph.children) == f"x {text}"
    (paragraph,) = [token for token in parser.parse(f"x {foreign_text.as_code(text)}") if token.type == "inline"]
    assert [(token.type, token.content) for token in paragraph.children] == [("text", "x "), ("code_inline", text)]


def test_dollars_in_markdown_are_no_mathematics():
    """CommonMark has none; others read what stands between two."""
    assert foreign_text.in_markdown("a$b$c") == r"a\$b\$c"
    assert foreign_text.in_markdown("snake_case _x") == r"snake_case \_x"


@pytest.mark.parametrize("text", [*NASTY, "two\nlines"])
def test_a_cell_of_a_markdown_table(text):
    cell = foreign_text.in_markdown_table(text)
    assert "\n" not in cell
    assert cell.replace(r"\|", "").count("|") == 0
    assert cell.replace(r"\|", "|") == text.replace("\n", " ")

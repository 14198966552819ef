"""Names, paths, tokens and notes shown as they are written, wherever brackets, dollars or bars have a meaning.

rich reads `[/INST]` as markup and `:x:` as an emoji, matplotlib reads `$` as mathematics, and so do many readers of
Markdown, which also makes links of brackets and ends a table's cell at `|`. Text that is not ours goes through one of
these functions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn
    from rich.text import Text


def console(**how: Any) -> Console:
    """
    A console that prints text as it is written. Colours are given by `style=` or [`as_written`].

    Args:
        how: further arguments of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, **how})


def as_written(text: object, style: str = "") -> Text:
    """Text for a table or any console: without markup and emoji codes, in one style."""
    from rich.text import Text

    return Text(str(text), style=style)


def description_column() -> TextColumn:
    """The column of a progress bar that shows a task's description as it is written."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)


def in_figure(text: object) -> str:
    """Text for matplotlib, which would read what stands between two `$` as mathematics."""
    return str(text).replace("$", r"\$")


def in_legend(text: object) -> str:
    """As [`in_figure`], for a legend, which leaves out labels that begin with `_`."""
    shown = in_figure(text)
    return f" {shown}" if shown.startswith("_") else shown


def in_markdown(text: object) -> str:
    """Text in Markdown, in one line, in which nothing is a link, mathematics, HTML, code or emphasis."""
    one_line = " ".join(str(text).split())
    escaped = re.sub(r"[\\`*\[\]<>$&]", r"\\\g<0>", one_line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", escaped)  # between letters and digits it has no meaning


def as_code(text: object) -> str:
    """Text as code in Markdown, in one line."""
    one_line = " ".join(str(text).split())
    if not one_line:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", one_line)), default=0))
    space = " " if one_line[:1] == "`" or one_line[-1:] == "`" else ""
    return f"{fence}{space}{one_line}{space}{fence}"


def in_markdown_table(text: object) -> str:
    """Text for a cell of a Markdown table: one line, in which bars do not end the cell."""
    return " ".join(str(text).replace("|", r"\|").split("\n"))
